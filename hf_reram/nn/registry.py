"""Which crossbar stands in for which digital layer."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .joined import joined_class

Kind = TypeVar("Kind", bound=type)

_CLASSES: dict[Any, Any] = {}
# Subclasses with a forward of their own that is known, by package and name, so that the package need not be there.
_NAMES: dict[tuple[str, str], Any] = {}


def register_crossbar(digital: type[nn.Module] | str) -> Callable[[Kind], Kind]:
    """Class decorator: layers of the class ``digital`` go on crossbars as the decorated class.

    ::

        @register_crossbar(nn.Conv1d)
        class CrossbarConv1d(CrossbarLayer, nn.Conv1d): ...

    A subclass of ``digital`` keeps its own methods and attributes beside those of the decorated class; one with a
    forward of its own computes something else, and stays digital unless it is registered too.

    Args:
        digital: class of the digital layer, or "package.ClassName" of one whose package need not be installed.

    Raises:
        TypeError: no class of a layer, or the decorated class is no :class:`~hf_reram.nn.CrossbarLayer`, lacks its
            contract, or does not derive from ``digital``.
    """
    from .layer import CrossbarLayer  # which says what the contract is

    if not isinstance(digital, str) and not (isinstance(digital, type) and issubclass(digital, nn.Module)):
        raise TypeError(f"register_crossbar({digital!r}): allowed is a class of layers, or 'package.ClassName'")

    def register(kind: Kind) -> Kind:
        bases = (CrossbarLayer,) if isinstance(digital, str) else (CrossbarLayer, digital)
        if not (isinstance(kind, type) and issubclass(kind, bases[0]) and issubclass(kind, bases[-1])):
            needed = " and ".join(base.__name__ for base in bases)
            raise TypeError(f"register_crossbar: {kind!r}: allowed is a subclass of {needed}")
        if missing := kind.missing_of_contract():
            raise TypeError(f"register_crossbar: {kind.__name__} lacks {', '.join(missing)}")
        if isinstance(digital, str):
            package, _, name = digital.partition(".")
            _NAMES[package, name.rpartition(".")[2]] = kind
        else:
            _CLASSES[digital] = kind
        return kind

    return register


def crossbar_class(module: nn.Module) -> Any:
    """The crossbar that stands in for a layer, or None."""
    cls: Any = type(module)
    known = _NAMES.get((cls.__module__.partition(".")[0], cls.__name__)) or _CLASSES.get(cls)
    if known is not None:
        return known
    for digital, kind in _CLASSES.items():
        if isinstance(module, digital) and cls.forward is digital.forward:
            return joined_class(kind, cls)
    return None


def is_kind(module: nn.Module) -> bool:
    """Whether a layer is of a class that can go on crossbars, or of a subclass."""
    return isinstance(module, tuple(_CLASSES)) or crossbar_class(module) is not None
