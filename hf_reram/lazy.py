"""Names of a package that are imported when they are first used."""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# One thread at a time: Python gives up where one imports a package, which imports its modules, and another a module
# of it first.
_LOCK = threading.RLock()


def load(module: str, name: str) -> Any:
    """A module's attribute, the module imported if need be."""
    with _LOCK:
        return getattr(importlib.import_module(module), name)


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562): its names, and its submodules, as attributes.

    Args:
        package: its ``__name__``.
        names: by the module that defines them, relative to the package; ".module" is beside it.
    """
    homes = {name: module for module, defined in names.items() for name in defined}

    def get(name: str) -> Any:
        if name in homes:
            value = load(importlib.util.resolve_name(f".{homes[name]}", package), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            with _LOCK:
                value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names_of
