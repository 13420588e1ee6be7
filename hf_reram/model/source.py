"""The source of a script's own modules, found without importing any."""

import ast
import hashlib
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from .code import imports_of
from .installed import OWN, of_library


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
        package = name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
        todo += [parent for parent in [name.rpartition(".")[0]] if parent]
        if file.endswith(".py"):
            todo += _imported(data, package)
    return [[name, found[name]] for name in sorted(found)]


@lru_cache(maxsize=4096)  # each function of a module asks anew
def _imported(source: bytes, package: str) -> frozenset[str]:
    try:
        code = compile(source, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # nobody can import it
        return frozenset()
    return frozenset(imports_of(code, package))


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
    return {target: now for target, value in said.items() if not _is_same(now := getattr(module, target, None), value)}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two literals are equal and of equal types; sets whatever the order of their items, which differs from
    process to process."""
    if type(one) is not type(other):
        return False
    if isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(other, dict):
        return len(one) == len(other) and all(map(_is_same, one.items(), other.items()))
    if isinstance(other, set):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return repr(one) == repr(other)


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
    return file if os.path.isfile(file) and not of_library(file) else None
