"""What a forward may read of a model that neither its state dict nor its config holds: buffers that are not saved, and
the plain attributes of its modules."""

import dis
import hashlib
import json
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from ..nn import CrossbarLayer
from ..nn.layer import ADDED
from ..nn.parts import Holder
from ..nn.places import Part
from ..nn.tensors import whole
from .find import TRANSPARENT, WRAPPERS, walk

PLAIN = (bool, int, float, str, type(None))
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
# What says nothing of an evaluation, or where a model is from.
LEFT_OUT = frozenset(
    (
        "training",
        "inplace",
        "momentum",
        "gradient_checkpointing",
        "name_or_path",
        "is_quantized",
        "quantization_method",
        "hf_device_map",
        "warnings_issued",
        *ADDED,
    )
)
TRAINING_ONLY = ("drop", "initializer")  # in the names of what an evaluation does not see
# Packages whose classes' own attributes say what a class can do, and change from version to version.
LIBRARIES = ("torch", "transformers", "peft", __name__.partition(".")[0])
CHANGING = ("append", "add", "clear", "extend", "insert", "pop", "remove", "update")  # methods of lists and the like
ROUNDED = 8  # of a float32's last bits, in which devices differ


def attributes_of(model: nn.Module) -> dict[str, str]:
    """Fingerprints, by attribute, of what all modules hold under it: of buffers that are not saved and other tensors,
    floating-point ones to 16 bits, of numbers and texts, tuples and dicts of them, the classes' own too, and of
    functions' and the modules' own classes' names (``class``). Without what only trainings read, and what a forward
    writes by itself, as counters of calls and caches."""
    found: dict[str, list[str]] = {}
    written = _written_by(model)
    for name, module in walk(model):
        if _is_of_parts(module):
            continue
        if not isinstance(module, WRAPPERS) and TRANSPARENT.isdisjoint(module._modules):
            found.setdefault("class", []).append(f"{name} {_class_of(module).__qualname__}")
        for attribute in _names(module):
            value = getattr(module, attribute, None)
            if _is_plain(value) and not _is_empty(value):
                found.setdefault(attribute, []).append(f"{name} {json.dumps(value, sort_keys=True)}")
            elif isinstance(value, torch.Tensor) and not value.is_meta:
                found.setdefault(attribute, []).append(f"{name} {_told(value)}")
            elif isinstance(value, FUNCTIONS) and not hasattr(type(module), attribute):
                found.setdefault(attribute, []).append(f"{name} {value.__qualname__}")
        for attribute in module._non_persistent_buffers_set:
            buffer = module._buffers.get(attribute)
            if buffer is not None and not buffer.is_meta:
                found.setdefault(attribute, []).append(f"{name} {_told(buffer)}")
    return {
        attribute: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
        for attribute, lines in sorted(found.items())
        if attribute not in written
    }


def _names(module: nn.Module) -> Iterator[str]:
    """Names of the module's attributes, and of those that its class has for all, that may count."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] not in LIBRARIES]
    own = {name: None for cls in classes if issubclass(cls, nn.Module) for name in vars(cls)}
    for name in {**vars(module), **own}:
        kept = not name.startswith("_") and name not in LEFT_OUT and not any(part in name for part in TRAINING_ONLY)
        if kept and not (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)):
            yield name


def _class_of(module: nn.Module) -> type:
    """The module's class, or that of which it was before it went on crossbars or FSDP2 has sharded it."""
    cls: Any = type(module)
    if isinstance(module, (CrossbarLayer, Holder)):
        cls = module._digital_class if isinstance(module, CrossbarLayer) else module._closed_class
    sharded = [parent.__name__ for parent in cls.__mro__[1:2]] == ["FSDPModule"]
    return cls.__mro__[2] if sharded else cls


def _is_empty(value: Any) -> bool:
    """Whether it is of containers alone, which loading may make anew where there were none."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (tuple, list)) and all(map(_is_empty, value))


def _is_of_parts(module: nn.Module) -> bool:
    """Whether it is a layer whose weight another module has, or what holds these together: there only on crossbars."""
    return isinstance(module, Part) or (
        not isinstance(module, Holder) and any(isinstance(child, Part) for child in module.children())
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    return isinstance(value, PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _told(buffer: torch.Tensor) -> str:
    values = whole(buffer.detach()).cpu().contiguous().reshape(-1)
    if values.is_floating_point():
        values = (values.float().view(torch.int32) + (1 << (ROUNDED - 1))) >> ROUNDED
    data = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return f"{buffer.dtype} {tuple(buffer.shape)} {hashlib.sha256(data).hexdigest()}"


# What forwards write


def _written_by(model: nn.Module) -> set[str]:
    """Names of attributes that forwards of the model's modules, and hooks of them, write on whatever."""
    classes: set[Any] = set()
    called: set[str] = {"forward"}
    written: set[str] = set()
    for _, module in walk(model):
        classes.add(_class_of(module))
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), vars(module).get("forward")]
        for hook in hooks:
            function = hook if hasattr(hook, "__code__") else type(hook).__call__
            function = getattr(function, "__func__", function)
            if isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] != LIBRARIES[-1]:
                found = _of_function(function)
                written |= found[0]
                called |= found[1]
    asked = {"__init__", "_init_weights", "reset_parameters"}  # which no forward calls
    while new := called - asked:  # methods of one module that another one's forward calls, too
        asked |= new
        for cls in classes:
            for name in new & _method_names(cls):
                found = _of_methods(cls, name)
                written |= found[0]
                called |= found[1]
    return written


@cache
def _method_names(cls: type) -> frozenset[str]:
    return frozenset(name for parent in cls.__mro__ if parent not in (nn.Module, object) for name in vars(parent))


@cache
def _of_methods(cls: type, name: str) -> tuple[frozenset[str], frozenset[str]]:
    """:func:`_of_function` of all that a class and its parents have under a name, of which ``super()`` may call
    each."""
    parts = [vars(parent).get(name) for parent in cls.__mro__ if parent not in (nn.Module, object)]
    parts = [part.fget if isinstance(part, property) else getattr(part, "__func__", part) for part in parts]
    found = [_of_function(part) for part in parts if isinstance(part, types.FunctionType)]
    return _joined(found)


def _of_function(function: types.FunctionType, seen: set[types.CodeType] | None = None) -> Any:
    """Names of attributes that a function writes, and all names that it loads, with what it wraps and the functions of
    its file that it names."""
    seen = set() if seen is None else seen
    if function.__code__ in seen:
        return frozenset(), frozenset()
    seen.add(function.__code__)
    found = [_looked_at(function.__code__)]
    wrapped = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    beside = [function.__globals__.get(name) for name in found[0][1]]
    for part in [*wrapped, *(part for part in beside if getattr(part, "__module__", None) == function.__module__)]:
        if isinstance(part, types.FunctionType):
            found.append(_of_function(part, seen))
    return _joined(found)


def _joined(found: list[Any]) -> tuple[frozenset[str], frozenset[str]]:
    written, loaded = zip(*found) if found else ((), ())
    return frozenset().union(*written), frozenset().union(*loaded)


@cache
def _looked_at(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of attributes that code writes, and all names that it loads."""
    written: set[str] = set()
    loaded: set[str] = set()
    by_line: dict[Any, set[str]] = {}
    before = None
    for step in dis.get_instructions(code):
        name, line = step.argval, step.positions.lineno if step.positions else None
        attribute = step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            written.add(name)
        if step.opname.startswith(("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")):
            written |= by_line.get(line, set())
        if attribute and before is not None and (name in CHANGING or (name.endswith("_") and not name.endswith("__"))):
            written.add(before)
        if attribute or step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_SUPER_ATTR"):
            loaded.add(str(name))
        if attribute:
            by_line.setdefault(line, set()).add(name)
        before = name if attribute else None
    if loaded & {"register_buffer", "setattr", "__dict__"}:
        written |= {part for part in code.co_consts if isinstance(part, str) and part.isidentifier()}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            more = _looked_at(part)
            written |= more[0]
            loaded |= more[1]
    return frozenset(written), frozenset(loaded)
