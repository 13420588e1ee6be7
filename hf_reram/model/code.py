"""Values and code as JSON values, which others have only if they are the same, and what code writes."""

import argparse
import ast
import dis
import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterator
from functools import cache
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nn.tensors import whole
from .installed import is_installed

PLAIN = (bool, int, float, str, type(None))
NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, np.ufunc)
# Methods that change lists and the like.
CHANGING = (
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault"),
    "update",
)
MAKING = ("__init__", "__post_init__", "_init_weights", "reset_parameters")  # which no forward calls
REGISTERING = ("register_buffer", "setattr", "__setattr__", "delattr")


class Untold(Exception):
    """Nothing tells a value from others of its kind."""


# Values


def told(
    value: Any, floats: list[torch.Tensor], above: frozenset[int] = frozenset(), written: frozenset[str] = frozenset()
) -> Any:
    """A value as JSON: numbers, texts and containers as they are, functions and classes by their names, arrays by their
    content, objects of a script's own classes by what they hold.

    Args:
        floats: gets the arrays of floating-point numbers in it, of which only the shape is told, since devices differ
            in their last bits. above: ids of what the value is in. written: attributes of an object that do not count,
            after a dot.

    Raises:
        Untold: it is of another kind, or in itself.
    """
    if id(value) in above:
        raise Untold
    above = above | {id(value)}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [told(part, floats, above) for part in value]
    if isinstance(value, dict):
        return {str(told(name, floats, above)): told(part, floats, above) for name, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(json.dumps(told(part, floats, above)) for part in value)]
    if isinstance(value, (bytes, complex, range, slice, type(...), enum.Enum)):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
    if isinstance(value, torch.Tensor):
        return _content(value, floats)
    if isinstance(value, functools.partial):
        return ["partial", *(told(part, floats, above) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, NAMED):
        return value.__qualname__ if hasattr(value, "__qualname__") else value.__name__
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)) or _is_own(value):
        return [type(value).__qualname__, _held(value, floats, above, written)]
    raise Untold


def _is_own(value: Any) -> bool:
    """Whether an object is of a class of a script's own that is nothing of an installed package, such as a module, a
    config or a data set."""
    return all(_counts(cls) or cls.__module__ in ("builtins", "abc", "typing") for cls in type(value).__mro__) and (
        _counts(type(value))
    )


def _held(value: Any, floats: list[torch.Tensor], above: frozenset[int], beside: frozenset[str]) -> dict[str, Any]:
    """Those attributes of an object that can be told, its class's among them, without those that its
    methods write, and those ``beside``."""
    parts = {name: part for cls in reversed(type(value).__mro__) if _counts(cls) for name, part in vars(cls).items()}
    methods = [part for name, part in parts.items() if isinstance(part, types.FunctionType) and name not in MAKING]
    written = beside.union(*(writes(method.__code__)[0] for method in methods))
    parts |= {name: getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())}  # also of slots
    found = {}
    for name, part in {**parts, **getattr(value, "__dict__", {})}.items():
        try:
            if name[:2] != "__" and f".{name}" not in written:
                found[name] = told(part, floats, above)
        except Untold:
            continue
    return found


def _counts(cls: type) -> bool:
    return not is_installed(cls.__module__)


def _content(tensor: torch.Tensor, floats: list[torch.Tensor]) -> str:
    if tensor.is_meta or tensor.layout != torch.strided:
        raise Untold
    values = whole(tensor.detach())
    if values.is_floating_point() or values.is_complex():
        floats.append(torch.view_as_real(values) if values.is_complex() else values)
        return f"floats {tuple(values.shape)}"
    data = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


# Code


def code_of(value: Any, floats: list[torch.Tensor], known: dict[Any, Any] | None = None) -> list[Any]:
    """A function, class or object with the code of a script's own that is in it, as JSON; empty where there is none.

    Args:
        floats: see :func:`told`. known: by id, code that is not told.
    """
    if not (code := code_in(value, floats, dict(known or {}))):
        return []
    try:
        return [told(value, floats), *code]
    except Untold:
        return code


def code_in(value: Any, floats: list[torch.Tensor], seen: dict[Any, Any] | None = None) -> list[Any]:
    """The code of a script's own in a function, class or object, as JSON: its bytecode, and the functions and
    values that it closes over or names and does not write. Empty where all is of installed packages.

    Args:
        floats: see :func:`told`. seen: by id, what is not told again.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return []
    seen[id(value)] = value
    if isinstance(value, types.FunctionType):
        code = value.__code__
        cells = zip(code.co_freevars, value.__closure__ or ())
        kept = [(name, cell) for name, cell in cells if name not in writes(code)[0] and cell != types.CellType()]
        inside = {name: cell.cell_contents for name, cell in kept}
        if not is_installed(value.__globals__.get("__name__")):  # its own, whatever it says that it wraps
            used = [("", value.__defaults__), ("", value.__kwdefaults__), *inside.items(), *_named(value).items()]
            return [_bytecode(code), *(_used(part, code, floats, seen, name) for name, part in used)]
        called = (types.FunctionType, types.MethodType, functools.partial)
        parts: list[Any] = [part for part in inside.values() if isinstance(part, called)]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
        parts = [value.__func__]
    elif isinstance(value, (property, functools.cached_property)):
        parts = [value.fget if isinstance(value, property) else value.func]
    elif isinstance(value, type):
        classes = [cls for cls in value.__mro__ if cls not in (nn.Module, object)]
        parts = [part for cls in classes for _, part in sorted(vars(cls).items())]
    else:
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # as functools.cache has it
        parts = [wrapped] if wrapped is not None else [type(value)] if _is_own(value) else []
    return [inner for part in parts if (inner := code_in(part, floats, seen))]


def _used(
    value: Any, code: types.CodeType, floats: list[torch.Tensor], seen: dict[Any, Any], name: str = ""
) -> list[Any]:
    """What code takes of a value that it has under a name and does not write there: all, or of modules, classes and
    settings the attributes that it names, too."""
    written = frozenset(found[len(name) :] for found in writes(code)[0] if name and found.startswith(f"{name}."))
    if isinstance(value, types.ModuleType) and is_installed(value.__name__):
        return []
    parted = (types.ModuleType, argparse.Namespace, types.SimpleNamespace)
    if isinstance(value, parted) or (isinstance(value, type) and _counts(value)):
        if (id(value), code) in seen:
            return []
        seen[id(value), code] = value
        names = sorted({name for part in codes_of(code) for name in part.co_names} & vars(value).keys())
        kept = [each for each in names if each[:2] != "__" and f".{each}" not in written]
        parts = [[each, _used(vars(value)[each], code, floats, seen)] for each in kept]
        return [*code_in(value, floats, seen), *parts]
    try:
        plain = told(value, floats, written=written)
    except Untold:
        plain = None
    return [plain, *code_in(value, floats, seen)]


def _named(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function reads and does not write."""
    names = {step.argval for part in codes_of(function.__code__) for step in dis.get_instructions(part) if _loads(step)}
    known = function.__globals__.keys() - writes(function.__code__)[0]
    return {name: function.__globals__[name] for name in sorted(names & known) if name[:2] != "__"}


def _loads(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_GLOBAL", "LOAD_NAME")


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code and what is defined in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_of(part)


def _bytecode(code: types.CodeType) -> list[Any]:
    constants = [_bytecode(part) if isinstance(part, types.CodeType) else told(part, []) for part in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


# What code writes


@cache
def writes(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names that a function's source assigns or changes in place, attributes after a dot and, where they are of a
    variable, after its name and a dot; attributes of others than ``self``, after a dot; and all attributes and
    functions that it names. None where the source is not there."""
    changed: list[ast.AST] = []
    written: set[str] = set()
    named: set[str] = set()
    for node in ast.walk(_tree(code)):
        if isinstance(node, (ast.Attribute, ast.Name, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            changed.append(node)
        if isinstance(node, (ast.Attribute, ast.Name)):
            named.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if isinstance(node.func, ast.Attribute) and (called in CHANGING or _is_in_place(called)):
            changed.append(node.func.value)
        changed += [keyword.value for keyword in node.keywords if keyword.arg == "out"]
        if called in REGISTERING:
            written.update(f".{part.value!s}" for part in node.args if isinstance(part, ast.Constant))
    chains = [[*_chain(node)] for node in changed]
    written |= {name for chain in chains for name in chain if name[0] == "." or len(chain) == 1}
    written |= {f"{chain[-1]}{chain[-2]}" for chain in chains if len(chain) > 1 and chain[-1][0] != "."}
    others = {name for chain in chains for name in (chain[:-2] if chain[-1:] == ["self"] else chain)}
    return frozenset(written), frozenset(others), frozenset(named)


def _is_in_place(method: str) -> bool:
    return method.endswith("_") and not method.endswith("__")


def _chain(node: ast.AST) -> Iterator[str]:
    """The names in ``self.one.two[3]``, attributes after a dot."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            yield f".{node.attr}"
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id


def _tree(code: types.CodeType) -> ast.AST:
    """Of a function; of lambdas all that are in the same lines, without what is around them."""
    try:
        source = inspect.getsource(code)
        tree = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError, TokenError):  # typed in, or a part of an expression
        return ast.Module([], [])
    if code.co_name != "<lambda>":
        return tree
    return ast.Tuple([node for node in ast.walk(tree) if isinstance(node, ast.Lambda)], ast.Load())
