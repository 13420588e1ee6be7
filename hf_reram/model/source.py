"""The source of a script's own modules, found without importing any."""

import ast
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from .code import imports_of
from .installed import OWN, of_library

# Of expressions that are the same wherever they are evaluated; and what of a module's globals is told by its value.
CONSTANT = (
    *(ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Load),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)
PLAIN = (bool, int, float, str, list, tuple, dict, set)


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
    """Globals of a module, and attributes of its classes, that its file sets to numbers, texts, or lists and the like
    of these, and that are something else now, as where a script has set or filled them; and such globals that it does
    not name. What is not imported yet has none."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py"):
        return {}
    source = Path(file).read_bytes()
    body, words = _body(source)
    found = _changed(body, vars(module))
    for node in body:
        if isinstance(node, ast.ClassDef) and isinstance(cls := getattr(module, node.name, None), type):
            found |= {f"{node.name}.{target}": now for target, now in _changed(node.body, vars(cls)).items()}
    new = [target for target in vars(module) if target not in words and not target.startswith("_")]
    return found | {target: getattr(module, target) for target in new if isinstance(getattr(module, target), PLAIN)}


@lru_cache(maxsize=256)
def _body(source: bytes) -> tuple[list[ast.stmt], frozenset[str]]:
    """The statements of a file, and all words in it."""
    return ast.parse(source).body, frozenset(re.findall(r"\w+", source.decode("utf-8", "replace")))


def _changed(body: list[ast.stmt], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of the variables that statements set to constants those that are something else now."""
    said: dict[str, Any] = {}
    for target, value in (pair for node in body for pair in _assignments(node)):
        if all(isinstance(part, CONSTANT) for part in ast.walk(value)):
            said[target] = eval(compile(ast.Expression(value), "<constant>", "eval"), {})  # numbers and texts alone
        else:
            said.pop(target, None)
    return {target: now.get(target) for target, value in said.items() if not _is_same(now.get(target), value)}


def _assignments(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        pairs: list[tuple[ast.expr, ast.expr]] = [(target, node.value)]
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(node.value, (ast.Tuple, ast.List)):
            pairs = [*zip(target.elts, node.value.elts)]
        yield from ((each.id, value) for each, value in pairs if isinstance(each, ast.Name))


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
