"""Which crossbar stands in for which digital layer."""

import re
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

    A subclass of ``digital`` keeps what it has of its own; one that overrides a method of ``digital``, such as its
    forward, computes something else, and stays digital unless it is registered too.

    Args:
        digital: class of the digital layer, or "package.ClassName" of one whose package need not be installed.

    Raises:
        TypeError: no class of a layer, or the decorated class is no :class:`~hf_reram.nn.CrossbarLayer`, lacks its
            contract, or does not derive from ``digital``.
    """
    from .layer import CrossbarLayer  # which says what the contract is

    known = isinstance(digital, type) and issubclass(digital, nn.Module) and digital is not nn.Module
    if not known and not (isinstance(digital, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", digital)):
        raise TypeError(f"register_crossbar({digital!r}): allowed is a class of layers, or 'package.ClassName'")

    def register(kind: Kind) -> Kind:
        bases = (CrossbarLayer,) if isinstance(digital, str) else (CrossbarLayer, digital)
        if not (isinstance(kind, type) and issubclass(kind, bases[0]) and issubclass(kind, bases[-1])):
            needed = " and ".join(base.__name__ for base in bases)
            raise TypeError(f"register_crossbar: {kind!r}: allowed is a subclass of {needed}")
        if missing := kind.missing_of_contract():
            raise TypeError(f"register_crossbar: {kind.__name__} lacks {', '.join(missing)}")
        owner = next(base for base in kind.__mro__ if "forward" in vars(base))
        if not issubclass(owner, CrossbarLayer):
            raise TypeError(
                f"register_crossbar: {kind.__name__} has the forward of {owner.__name__}: derive it from CrossbarLayer "
                "first"
            )
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
    if (known := _registered(cls)) is not None:
        return known
    for parent in cls.__mro__:  # the closest one
        if parent in _CLASSES:
            return joined_class(_CLASSES[parent], cls) if _computes_as(cls, parent) else None
    return None


# What a layer's class may have of its own without computing something else.
_HARMLESS = frozenset(("__init__", "reset_parameters", "extra_repr", "__repr__", "__setstate__"))


def _computes_as(cls: type, parent: type) -> bool:
    """Whether a subclass has all methods of a class of layers, such as its forward and what that calls."""
    methods = {
        name
        for base in parent.__mro__[: parent.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if callable(value) and name not in _HARMLESS
    }
    return all(getattr(cls, name) is getattr(parent, name) for name in methods)


def _registered(cls: type) -> Any:
    return _NAMES.get((cls.__module__.partition(".")[0], cls.__name__)) or _CLASSES.get(cls)


def is_registered(cls: type) -> bool:
    """Whether a class of layers itself is registered, by whatever."""
    return _registered(cls) is not None


def is_kind(module: nn.Module) -> bool:
    """Whether a layer is of a class that can go on crossbars, or of a subclass."""
    return isinstance(module, tuple(_CLASSES)) or crossbar_class(module) is not None
