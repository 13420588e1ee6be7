"""What Python code names: globals, what it reads of modules, and the source of a script's own modules."""

import ast
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from ..model.code import codes_of, set_by, steps_of
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
        for step in steps_of(part):
            if name is not None and step.opname in ATTRIBUTES:
                chain.append(step.argval)
                continue
            if name is not None:
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
        steps = steps_of(part)
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
    their order. None is imported for it."""
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
            try:
                code = compile(data, file, "exec")
            except (SyntaxError, ValueError):  # nobody can import it
                continue
            todo += imports_of(code, name if is_package else name.rpartition(".")[0])
    return [[name, found[name]] for name in sorted(found)]


def set_since(name: str) -> dict[str, Any]:
    """Globals of a module that its file sets to numbers, texts, or lists and the like of these, and that are something
    else now, as where a script has set or filled them. What is not imported yet has none."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py"):
        return {}
    said = {}
    for node in ast.parse(Path(file).read_bytes()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name) and node.value is not None:
            try:
                said[target.id] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                said.pop(target.id, None)
    return {target: now for target, value in said.items() if repr(now := getattr(module, target, None)) != repr(value)}


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is, found without importing it or the package that it is in."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    package, _, last = name.rpartition(".")
    if package:
        inside = _spec(package)
        folders = list(inside.submodule_search_locations or ()) if inside else []
        return PathFinder.find_spec(last, folders) if folders else None
    found = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in found if spec is not None), None)


def _place(name: str) -> str:
    """A module's file, or the folder of one that is only a folder; "" where there is none."""
    if (spec := _spec(name)) is None:
        return getattr(sys.modules.get(name), "__file__", None) or ""
    return (spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), "")) or ""


def _local_file(name: str) -> str | None:
    """The file of a module that is no installed package's; None of others, and where there is none."""
    file = "" if name.partition(".")[0] == OWN else _place(name)
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
            (known if own else others).update(set_by(cls))
    return {
        name: part
        for name, part in vars(value).items()
        if name not in known
        and not name.startswith("__")
        and (name not in others or (not name.startswith("_") and (not runs or isinstance(part, SETTLED))))
    }
