"""Modules that hold the weights of several layers: opened, so that these can go on crossbars, and closed again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..nn import CrossbarLayer
from ..nn.parts import Holder, close_holder, holder_class, open_holder
from .bypass import left_digital, renew_methods
from .find import walk


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Every such module that can be is open inside; afterwards those that have a crossbar."""
    closed, found = left_digital(model), []
    try:
        for name, module in list(walk(model)):
            if (kind := holder_class(module)) is not None and name not in closed:
                before = type(module)
                found.append(open_holder(module, kind))
                renew_methods(module, before)
        yield
    finally:
        close_unused(found)


def close_unused(modules: Iterable[nn.Module]) -> None:
    """Close those in which no layer is on a crossbar."""
    for module in list(modules):
        if isinstance(module, Holder) and not any(isinstance(m, CrossbarLayer) for m in module.modules()):
            before = type(module)
            close_holder(module)
            renew_methods(module, before)
