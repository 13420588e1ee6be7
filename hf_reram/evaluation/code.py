"""What Python code names: globals, what it reads of modules, and the source of modules of a script's own."""

import dis
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..model.code import codes_of
from ..model.installed import LIBRARIES, OWN, is_installed

LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
SETTLED = (bool, int, float, str, type(None), types.FunctionType, types.MethodType, nn.Module)
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def globals_of(code: types.CodeType) -> dict[str, set[tuple[str, ...]]]:
    """Names of the globals that code reads, each with the attributes that it takes of them, as ("path", "join") in
    ``os.path.join``; () where it takes the object itself."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for part in codes_of(code):
        name: str | None = None
        chain: list[str] = []
        for step in dis.get_instructions(part):
            if name is not None and step.opname in ATTRIBUTES:
                chain.append(step.argval)
                continue
            if name is not None and step.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG"):
                found.setdefault(name, set()).add(tuple(chain))
                name, chain = None, []
            if step.opname in LOADS:
                name, chain = step.argval, []
    return found


def imports_of(code: types.CodeType, package: str) -> set[str]:
    """Full names of the modules that code imports, and may import, where ``from a import b`` may take a module b.

    Args:
        package: that relative imports start from, "" where there is none.
    """
    found: set[str] = set()
    for part in codes_of(code):
        steps = [step for step in dis.get_instructions(part) if step.opname != "EXTENDED_ARG"]
        for at, step in enumerate(steps):
            if step.opname != "IMPORT_NAME":
                continue
            level, names = (before.argval for before in steps[at - 2 : at])
            try:
                name = importlib.util.resolve_name("." * level + step.argval, package or None) if level else step.argval
            except ImportError:  # beyond the top, as it would fail itself
                continue
            found |= {name, *(f"{name}.{part}" for part in names or () if part != "*")}
    return found


def source_of(names: Iterable[str]) -> list[list[str]]:
    """Names and SHA-256 of the files of modules, and of those that they import, that are no installed package's, in
    their order."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        file = None if name in found else _local_file(name)
        if file is None:
            continue
        data = Path(file).read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
        is_package = Path(file).name == "__init__.py"
        todo += [parent for parent in [name.rpartition(".")[0]] if parent]
        if file.endswith(".py"):
            todo += imports_of(compile(data, file, "exec"), name if is_package else name.rpartition(".")[0])
    return [[name, found[name]] for name in sorted(found)]


def _place(name: str) -> str:
    """A module's file, or the folder of one that is only a folder; "" where there is none."""
    try:
        spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no such module, as the code itself would find
        return ""
    if spec is None:
        return getattr(sys.modules.get(name), "__file__", None) or ""
    return (spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), "")) or ""


def _local_file(name: str) -> str | None:
    """The file of a module that is no installed package's; None of others, and where there is none."""
    top = name.partition(".")[0]  # first, since to look for a module imports what it is in
    if top == OWN or not _place(top) or f"{_place(top)}{os.sep}".startswith(LIBRARIES):
        return None
    file = _place(name)
    return file if not f"{file}{os.sep}".startswith(LIBRARIES) and os.path.isfile(file) else None


# What a subclass adds


def added_attributes(value: Any, library: str, runs: bool = False) -> dict[str, Any]:
    """Attributes of an object that no method of a library's classes, of those that it is of, sets on it: what a
    subclass has beside what the library gives it, or a script has set.

    Args:
        library: a package. runs: whether the object keeps records of its running; of what the classes of further
            installed packages set, only numbers, texts, functions and modules then count.
    """
    known: set[str] = set()
    others: set[str] = set()
    for cls in type(value).__mro__:
        if is_installed(cls.__module__):
            own = cls.__module__.partition(".")[0] in (library, OWN)
            (known if own else others).update(_set_by(cls))
    return {
        name: part
        for name, part in vars(value).items()
        if name not in known
        and not name.startswith("__")
        and (name not in others or (not name.startswith("_") and (not runs or isinstance(part, SETTLED))))
    }


@cache
def _set_by(cls: type) -> frozenset[str]:
    """Names of attributes that a class's methods set on their object, its fields and cached properties."""
    found = {*getattr(cls, "__dataclass_fields__", ()), *vars(cls).get("__annotations__", ())}
    for name, part in vars(cls).items():
        if hasattr(part, "func") and not callable(part):
            found.add(name)
        inner = (getattr(part, attribute, None) for attribute in ("fget", "func", "__func__"))
        function = next((each for each in inner if each is not None), part)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        for code in codes_of(function.__code__) if isinstance(function, types.FunctionType) else ():
            own, before = function.__code__.co_varnames[:1], None
            for step in dis.get_instructions(code):
                last = before[-1:] if isinstance(before, tuple) else (before,)
                if step.opname == "STORE_ATTR" and last == own:
                    found.add(step.argval)
                before = step.argval
    return frozenset(found)
