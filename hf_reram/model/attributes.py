"""What a forward may read of a model that neither its state dict nor its config holds: buffers that are not saved, the
plain attributes of its modules, and code of a script's own."""

import functools
import hashlib
import json
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ..device.checks import is_finite
from ..nn import CrossbarLayer
from ..nn.layer import ADDED
from ..nn.parts import Holder
from ..nn.places import Part
from .code import MAKING, NAMED, Untold, code_of, told, writes
from .find import TRANSPARENT, WRAPPERS, walk
from .installed import OWN, is_installed

# What says nothing of an evaluation, or where a model is from.
LEFT_OUT = frozenset(
    (
        "training",
        "inplace",
        "momentum",
        "name_or_path",
        "model_tags",
        "is_quantized",
        "quantization_method",
        "hf_device_map",
        "warnings_issued",
        *ADDED,
    )
)
TRAINING_ONLY = ("drop", "initializer", "checkpointing")  # in the names of what an evaluation does not see
# What transformers' ``dynamic_rope_update`` writes of a module, of those kinds of ``rope_type`` alone.
DYNAMIC_ROPE = ("dynamic", "longrope")
WRITTEN_OF_ROPE = ("inv_freq", "attention_scaling", "max_seq_len_cached")
# The end of names of sums of floating-point numbers, and the name of code, whose bytecode is another in each Python.
VALUES, CODE = " values", f"code of Python {sys.version_info.major}.{sys.version_info.minor}"
GOLDEN = 0.6180339887498949
CALLED = (*NAMED, functools.partial)
# Where what wraps a function has it.
INNER: Any = (
    (types.FunctionType, "__wrapped__"),
    ((types.MethodType, staticmethod, classmethod), "__func__"),
    ((functools.partial, functools.cached_property), "func"),
    (property, "fget"),
)
TOLERANCE = 1e-5  # of sums, relative to those of the sizes: devices differ in the last bits


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """What all modules hold, by attribute: fingerprints of numbers, texts, containers, functions' names and tensors of
    integers, of buffers that are not saved as of others, and of the modules' classes' names (``class``). Of
    floating-point tensors three sums, under the name and :data:`VALUES`, which :func:`are_close` compares. Of code that
    is no installed package's a fingerprint, as :data:`CODE`. Without what only trainings read, and what a forward
    writes by itself, as counters of calls and caches."""
    found = _Found()
    written = _written_by(model)
    for name, module in walk(model):
        if _is_of_parts(module):
            continue
        cls = _class_of(module)
        if not isinstance(module, WRAPPERS) and TRANSPARENT.isdisjoint(module._modules):
            found.add("class", name, cls.__qualname__)
        for attribute, value in _held(module):
            remembered = isinstance(getattr(cls, attribute, None), functools.cached_property)
            if remembered or f".{attribute}" in written[cls] or _is_dynamic(module, attribute):
                continue
            if isinstance(value, CALLED) and hasattr(cls, attribute):  # a method of its own, as of what has wrapped it
                methods = {id(part): part for parent in cls.__mro__ for part in vars(parent).values()}
                found.add_code(attribute, name, value, methods)
            else:
                found.add_value(attribute, name, value)
                found.add_code(attribute, name, value)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            found.add_code("hooks", name, hook)
    for cls in written:
        found.add_code("class", "", cls)
    return found.fingerprints()


class _Found:
    """Lines of what modules hold, and sums of floating-point tensors, by attribute."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {CODE: []}
        self.sums: dict[str, list[float]] = {}

    def add(self, attribute: str, name: str, line: str, floats: Sequence[torch.Tensor] = ()) -> None:
        self.lines.setdefault(attribute, []).append(f"{name} {line}")
        self.add_floats(attribute, name, floats)

    def add_value(self, attribute: str, name: str, value: Any) -> None:
        floats: list[torch.Tensor] = []
        try:
            part = told(value, floats)
        except Untold:
            return
        if isinstance(value, torch.Tensor) and floats:
            self.add_floats(attribute, name, floats)
        elif not _is_empty(value):
            as_it_is = isinstance(value, (torch.Tensor, *NAMED))
            self.add(attribute, name, part if as_it_is else json.dumps(part, sort_keys=True), floats)

    def add_code(self, attribute: str, name: str, value: Any, known: dict[Any, Any] | None = None) -> None:
        floats: list[torch.Tensor] = []
        if code := code_of(value, floats, known):
            self.add(CODE, f"{attribute} of {name}", json.dumps(code), floats)

    def add_floats(self, attribute: str, name: str, floats: Sequence[torch.Tensor]) -> None:
        for at, tensor in enumerate(floats):
            before = self.sums.get(f"{attribute}{VALUES}", [0.0, 0.0, 0.0])
            now = _sums(tensor, f"{name} {at}")
            self.sums[f"{attribute}{VALUES}"] = [one + other for one, other in zip(before, now)]

    def fingerprints(self) -> dict[str, Any]:
        hashes = {
            attribute: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
            for attribute, lines in self.lines.items()
        }
        return dict(sorted({**hashes, **self.sums}.items()))


NO_CODE = _Found().fingerprints()[CODE]  # what is told of models of libraries alone


def _sums(tensor: torch.Tensor, name: str) -> list[float]:
    """How many numbers, their sizes' sum, and that of the numbers times weights of their places, other ones for each
    name."""
    values = tensor.cpu().reshape(-1).double().nan_to_num(nan=0.0).clamp(-1e30, 1e30)
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
    weights = torch.arange(first, first + values.numel(), dtype=torch.float64).mul_(GOLDEN).sin_()
    return [float(values.numel()), float(values.abs().sum()), float(values @ weights)]


def are_close(one: Any, other: Any) -> bool:
    """Whether two lists of sums are those of the same numbers but for their last bits."""
    if not all(isinstance(sums, list) and len(sums) == 3 and all(map(is_finite, sums)) for sums in (one, other)):
        return False
    allowed = TOLERANCE * max(one[1], other[1])
    return one[0] == other[0] and all(abs(a - b) <= allowed for a, b in zip(one[1:], other[1:]))


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The module's attributes that may count, buffers that are not saved and what its class has for all among them."""
    classes = [cls for cls in reversed(type(module).__mro__) if issubclass(cls, nn.Module)]
    own = [vars(cls) for cls in classes if not is_installed(cls.__module__)]
    shared = {name: value for each in own for name, value in each.items() if not isinstance(value, NAMED)}
    unsaved = module._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in module._buffers.items() if name in unsaved and buffer is not None}
    for name, value in {**shared, **vars(module), **buffers}.items():
        kept = not name.startswith("_") and name not in LEFT_OUT and not any(part in name for part in TRAINING_ONLY)
        if kept and not (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)):
            yield name, value


def _is_dynamic(module: nn.Module, attribute: str) -> bool:
    """Whether transformers' ``dynamic_rope_update`` writes the attribute as the length of the input says."""
    kinds = str(vars(module).get("rope_type"))
    written = any(part in attribute for part in WRITTEN_OF_ROPE) and "original" not in attribute
    return written and any(kind in kinds for kind in DYNAMIC_ROPE)


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
    return isinstance(value, (tuple, list, set)) and all(map(_is_empty, value))


def _is_of_parts(module: nn.Module) -> bool:
    """Whether it is a layer whose weight another module has, or what holds these together: there only on crossbars."""
    return isinstance(module, Part) or (
        not isinstance(module, Holder) and any(isinstance(child, Part) for child in module.children())
    )


# What forwards write


def _written_by(model: nn.Module) -> dict[type, set[str]]:
    """Names, after a dot, of attributes that forwards write on modules of a class, or hooks of these: with all methods
    that a forward of any of the model's modules names, and functions of their files."""
    begun: dict[type, list[types.FunctionType]] = {}
    for _, module in walk(model):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), vars(module).get("forward")]
        hooks = [hook if isinstance(hook, CALLED) else type(hook).__call__ for hook in hooks]
        begun.setdefault(_class_of(module), []).extend(found for hook in hooks for found in _function(hook))
    written: dict[type, set[str]] = {cls: set() for cls in begun}
    elsewhere: set[str] = set()  # on modules of whichever class
    looked: set[tuple[type, types.CodeType]] = set()
    asked, new = set(MAKING), {"forward"}
    while new:
        asked |= new
        named: set[str] = set()
        for cls in begun:
            todo = [function for name in new & _names(cls) for function in _functions(cls, name)] + begun[cls]
            while todo:
                function = todo.pop()
                if (cls, function.__code__) in looked:
                    continue
                looked.add((cls, function.__code__))
                names, others, loaded = writes(function.__code__)
                written[cls] |= names
                elsewhere |= others
                named |= loaded
                beside = [found for name in loaded for found in _function(function.__globals__.get(name))]
                todo += [found for found in beside if found.__globals__ is function.__globals__]
        new = named - asked
    return {cls: names | elsewhere for cls, names in written.items()}


@cache
def _names(cls: type) -> frozenset[str]:
    return frozenset(name for parent in cls.__mro__ if parent not in (nn.Module, object) for name in vars(parent))


def _functions(cls: type, name: str) -> list[types.FunctionType]:
    """All that a class and its parents have under a name, of which ``super()`` may call each."""
    parts = [vars(parent).get(name) for parent in cls.__mro__ if parent not in (nn.Module, object)]
    return [found for part in parts for found in _function(part)]


def _function(value: Any) -> list[types.FunctionType]:
    """The function that a hook, method or property is, without what decorates it; none of this package's."""
    inner = value
    while inner is not None:
        value = inner
        inner = next((getattr(value, name, None) for kind, name in INNER if isinstance(value, kind)), None)
    if not isinstance(value, types.FunctionType):
        return []
    return [value] if str(value.__globals__.get("__name__")).partition(".")[0] != OWN else []
