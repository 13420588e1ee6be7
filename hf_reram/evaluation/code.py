"""What Python code names and changes: globals, what it reads of modules, and the source of a script's own modules."""

import ast
import dis
import hashlib
import importlib.util
import os
import sys
import types
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from ..model.code import CHANGING, codes_of
from ..model.installed import LIBRARIES, OWN, is_installed

LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
SETTLED = (bool, int, float, str, type(None), types.FunctionType, types.MethodType, nn.Module)
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
OVERWRITING = ("copy_", "fill", "fill_", "zero_")  # of tensors and arrays
# By which an object is used.
USES = ("__call__", "__getitem__", "__getitems__", "__iter__", "__next__", "__len__", "forward")


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
    """Globals of a module that its file sets, once, to a number, a text or the like, and that are something else now:
    set from outside. Empty lists and the like are filled by use, and what is not imported yet has none."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py"):
        return {}
    tree = ast.parse(Path(file).read_bytes())
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    count = Counter(node.id for node in names)
    found = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name) and count[target.id] == 1:
            try:
                said = ast.literal_eval(node.value) if node.value else {}
            except (ValueError, TypeError):
                continue
            if said not in ({}, []) and repr(now := getattr(module, target.id, None)) != repr(said):
                found[target.id] = now
    return found


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


# What code changes


@cache
def changed_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names of variables that are not code's own and, with a dot before, of attributes of its first argument: those
    that it sets, those that it changes in place, as by ``append`` or under an index, with "[:]" after them where all of
    a tensor is written, and all that it names, also with what it takes of them, as in "meter update"."""
    own, bound, altered, named = code.co_varnames[:1], set(), set(), set()
    for part in codes_of(code):
        steps = list(dis.get_instructions(part))
        loaded: list[str] = []  # by step, what it leaves on top, "." for the argument
        for step in steps:
            name, before, now = step.argval, loaded[-1] if loaded else "", ""
            if "LOAD_FAST" in step.opname or step.opname in (*LOADS, "LOAD_DEREF"):
                last = name[-1] if isinstance(name, tuple) else name
                now = "." if (last,) == own else "" if "LOAD_FAST" in step.opname else last
            elif step.opname in ATTRIBUTES and before == ".":
                now = f".{name}"
                bound |= {now} if steps[len(loaded) - 1].opname == "COPY" else set()  # of `self.count += 1`
            elif step.opname in ATTRIBUTES and before:
                named.add(f"{before} {name}")
                altered |= {before} if name in CHANGING else {f"{before}[:]"} if name in OVERWRITING else set()
            elif step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
                bound.add(name)
            elif step.opname in ("STORE_ATTR", "DELETE_ATTR") and before == ".":
                bound.add(f".{name}")
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                index = _indexed(steps, loaded)
                altered |= {index, f"{index}[:]"} if _is_whole(steps[: len(loaded)]) else {index}
            elif step.opname == "STORE_SLICE" and _is_whole(steps[: len(loaded)]):  # as of Python 3.12
                altered |= {loaded[-3], f"{loaded[-3]}[:]"}
            elif step.opname == "COPY" and step.arg == 1:
                now = before
            loaded.append(now)
        named |= {*loaded}
    return frozenset(bound), frozenset(altered), frozenset(named)


def _indexed(steps: list[dis.Instruction], loaded: list[str]) -> str:
    """What the index is of that the last of the steps that ``loaded`` is of has left on top."""
    left, at = 0, len(loaded)
    while at > 0 and left != 1:
        at -= 1
        left += dis.stack_effect(steps[at].opcode, steps[at].arg, jump=False)
        if left == 1 and steps[at].opname == "COPY":  # as of `a[i] += 1`, which keeps both
            left = 0
    return loaded[at - 1] if at else ""


def _is_whole(steps: list[dis.Instruction]) -> bool:
    """Whether the index that the last of the steps leave on top is ``[:]`` or ``[...]``."""
    texts = [step.argrepr for step in steps if step.opname != "BUILD_SLICE"]
    return texts[-2:] == ["None", "None"] or texts[-1] in ("Ellipsis", "slice(None, None, None)")


def _code_of(part: Any) -> types.CodeType | None:
    """Of a method, property or the like."""
    inner = (getattr(part, attribute, None) for attribute in ("fget", "func", "__func__"))
    function = next((each for each in inner if each is not None), part)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__ if isinstance(function, types.FunctionType) else None


@cache
def changed_in_use(cls: type, uses: frozenset[str] = frozenset()) -> tuple[frozenset[str], ...]:
    """Names of attributes that objects of a class set, and that they change in place, when they are called, run through
    or asked for items, or by ``uses``, their methods that something calls: their state. What their making is told is
    none. Third, what they take of attributes, as :func:`changed_in` has it."""
    bound: set[str] = set()
    altered: set[str] = set()
    asked: set[str] = set()
    todo = [*USES, *uses]
    while todo:
        asked.add(name := todo.pop())
        for code in filter(None, (_code_of(vars(parent).get(name)) for parent in cls.__mro__)):
            sets, alters, names = ({name[1:] for name in found if name[:1] == "."} for found in changed_in(code))
            bound |= sets
            altered |= alters
            todo += names - asked
    made = (_code_of(vars(parent).get("__init__")) for parent in cls.__mro__)
    told = {name for code in made if code for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    altered -= {*told, *(f"{name}[:]" for name in told)}
    return frozenset(bound - told), frozenset(altered), frozenset(asked)


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
        if code := _code_of(part):
            found |= {name[1:] for name in changed_in(code)[0] if name[0] == "."}
    return frozenset(found)
