"""Values and code as JSON values, which others have only if they are the same, and attributes that code sets and
reads."""

import argparse
import dis
import enum
import functools
import hashlib
import json
import types
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nn.tensors import whole
from .installed import is_installed

PLAIN = (bool, int, float, str, type(None))
NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, np.ufunc)
# Where what wraps a function has it.
INNER: Any = (
    (types.FunctionType, "__wrapped__"),
    ((types.MethodType, staticmethod, classmethod), "__func__"),
    ((functools.partial, functools.cached_property), "func"),
)
SKIPPED = ("CACHE", "PRECALL", "EXTENDED_ARG")  # which do nothing by themselves


class Untold(Exception):
    """Nothing tells a value from others of its kind."""


# Values


def told(value: Any, floats: list[torch.Tensor], above: frozenset[int] = frozenset()) -> Any:
    """A value as JSON: numbers, texts and containers as they are, functions and classes by their names, arrays by their
    content, objects of a script's own classes by what they hold.

    Args:
        floats: gets the arrays of floating-point numbers in it, of which only the shape is told, since devices differ
            in their last bits. above: ids of what the value is in.

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
        return [type(value).__qualname__, _held(value, floats, above)]
    raise Untold


def _is_own(value: Any) -> bool:
    """Whether an object is of a class of a script's own that is nothing of an installed package, such as a module, a
    config or a data set."""
    return all(_counts(cls) or cls.__module__ in ("builtins", "abc", "typing") for cls in type(value).__mro__) and (
        _counts(type(value))
    )


def _held(value: Any, floats: list[torch.Tensor], above: frozenset[int]) -> dict[str, Any]:
    """Those attributes of an object that can be told, its class's among them."""
    parts = {name: part for cls in reversed(type(value).__mro__) if _counts(cls) for name, part in vars(cls).items()}
    parts |= {name: getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())}  # also of slots
    found = {}
    for name, part in {**parts, **getattr(value, "__dict__", {})}.items():
        try:
            if name[:2] != "__":
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


def code_in(value: Any, held: list[tuple[str, Any]], seen: dict[Any, Any]) -> list[Any]:
    """The bytecode of a script's own in a function, class or object, and of all that this names, as JSON values. Empty
    where all is of installed packages.

    Args:
        held: gets the values that the code closes over or names, by their names. seen: by id, what is not told again;
            gets all that is looked at.
    """
    if id(value) in seen:
        return []
    seen[id(value)] = value
    if isinstance(value, types.FunctionType):
        code = value.__code__
        cells = zip(code.co_freevars, value.__closure__ or ())
        inside = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
        if not is_installed(value.__globals__.get("__name__")):  # its own, whatever it says that it wraps
            defaults = [("defaults", part) for part in (value.__defaults__, value.__kwdefaults__) if part is not None]
            used = [*defaults, *inside.items(), *_named(value).items()]
            return [_bytecode(code), *(inner for name, part in used for inner in _used(name, part, code, held, seen))]
        called = (types.FunctionType, types.MethodType, functools.partial)
        parts: list[Any] = [part for part in inside.values() if isinstance(part, called)]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
        parts = [value.__func__]
    elif isinstance(value, property):
        parts = [value.fget, value.fset]
    elif isinstance(value, functools.cached_property):
        parts = [value.func]
    elif isinstance(value, type):
        classes = [cls for cls in value.__mro__ if cls not in (nn.Module, object)]
        parts = [part for cls in classes for _, part in sorted(vars(cls).items())]
    else:
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # as functools.cache has it
        parts = [wrapped] if wrapped is not None else [type(value)] if _is_own(value) else []
    found = [inner for part in parts if (inner := code_in(part, held, seen))]
    if found and isinstance(value, functools.partial):
        held.append(("arguments", [value.args, value.keywords]))
    if found and isinstance(value, types.MethodType):
        held.append(("self", value.__self__))
    if _is_own(value):
        held.append((type(value).__qualname__, value))
    return found


def _used(
    name: str, value: Any, code: types.CodeType, held: list[tuple[str, Any]], seen: dict[Any, Any]
) -> Iterator[Any]:
    """The code in what code takes of a value that it has under a name: all, or of modules, classes and settings the
    attributes that it names, too."""
    if isinstance(value, types.ModuleType) and is_installed(value.__name__):
        return
    if inner := code_in(value, held, seen):
        yield inner
    parted = (types.ModuleType, argparse.Namespace, types.SimpleNamespace)
    if not isinstance(value, parted) and not (isinstance(value, type) and _counts(value)):
        held.append((name, value))
    elif (id(value), code) not in seen:
        seen[id(value), code] = value
        for part in sorted({name for each in codes_of(code) for name in each.co_names} & vars(value).keys()):
            if part[:2] != "__":
                yield from _used(f"{name}.{part}", vars(value)[part], code, held, seen)


def _named(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function reads."""
    names = {step.argval for part in codes_of(function.__code__) for step in steps_of(part) if _loads(step)}
    known = names & function.__globals__.keys()
    return {name: function.__globals__[name] for name in sorted(known) if name[:2] != "__"}


def _loads(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_GLOBAL", "LOAD_NAME")


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code and what is defined in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_of(part)


def steps_of(code: types.CodeType) -> list[dis.Instruction]:
    """What code does, in its order, without what is defined in it."""
    return [step for step in dis.get_instructions(code) if step.opname not in SKIPPED]


def _bytecode(code: types.CodeType) -> list[Any]:
    constants = [_bytecode(part) if isinstance(part, types.CodeType) else told(part, []) for part in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def functions_in(value: Any) -> list[types.FunctionType]:
    """The functions that a method, property or the like is of, without what decorates them."""
    if isinstance(value, property):
        return [inner for part in (value.fget, value.fset) for inner in functions_in(part)]
    inner = value
    while inner is not None:
        value = inner
        inner = next((getattr(value, name, None) for kind, name in INNER if isinstance(value, kind)), None)
    return [value] if isinstance(value, types.FunctionType) else []


# What code sets and reads


@cache
def sets(code: types.CodeType) -> frozenset[str]:
    """Names of attributes, and of buffers, that code sets on its first argument."""
    found, steps = set(), steps_of(code)
    for at, step in enumerate(steps):
        added = step.opname == "LOAD_ATTR" and steps[at - 1].opname == "COPY"  # as in `self.count += 1`
        before = steps[at - 2 if added else at - 1]
        last = before.argval[-1:] if isinstance(before.argval, tuple) else (before.argval,)
        if (added or step.opname == "STORE_ATTR") and "LOAD_" in before.opname and last == code.co_varnames[:1]:
            found.add(step.argval)
    return frozenset(found | (_texts(code) if "register_buffer" in code.co_names else set()))


@cache
def reads(code: types.CodeType) -> frozenset[str]:
    """Names of attributes that code may read, of whichever object, but to set them anew as in ``self.count += 1``."""
    found = set()
    for part in codes_of(code):
        for before, step in pairwise(steps_of(part)):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and before.opname != "COPY":
                found.add(step.argval)
        found |= _texts(part)  # as in getattr(self, "count")
    return frozenset(found)


def _texts(code: types.CodeType) -> set[str]:
    return {part for part in code.co_consts if isinstance(part, str) and part.isidentifier()}


@cache
def set_by(cls: type) -> frozenset[str]:
    """Names of attributes that a class's methods set on their object, its fields and cached properties."""
    found = {*getattr(cls, "__dataclass_fields__", ()), *vars(cls).get("__annotations__", ())}
    for name, part in vars(cls).items():
        if isinstance(part, functools.cached_property):
            found.add(name)
        found.update(*(sets(function.__code__) for function in functions_in(part)))
    return frozenset(found)
