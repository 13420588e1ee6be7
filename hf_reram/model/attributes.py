"""What a forward may read of a model that neither its state dict nor its config holds: buffers that are not saved, the
plain attributes of its modules, and code of a script's own."""

import functools
import hashlib
import json
import re
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ..device.checks import is_finite
from ..nn import CrossbarLayer
from ..nn.layer import ADDED
from ..nn.parts import Holder
from ..nn.places import Part
from .code import NAMED, Untold, code_in, codes_of, functions_in, reads, set_by, sets, told
from .find import TRANSPARENT, WRAPPERS, walk
from .installed import is_installed

# What torch has on every module, and what this package, torch, transformers, accelerate, peft and timm put on modules
# from outside: it says nothing of an evaluation, or where a model is from.
OF_LIBRARIES = frozenset(
    (
        *vars(nn.Module()),
        *("_digital_class", "_closed_class", "_part_names", "_crossbar_hooks", "_was_inplace", "_switched"),
        *("_ddp_params_and_buffers_to_ignore", "_param_name_to_source", "_distribute_module_applied"),
        *("name_or_path", "model_tags", "warnings_issued", "is_quantized", "quantization_method", "hf_device_map"),
        *("gradient_checkpointing", "_gradient_checkpointing_func", "checkpointing_function", "grad_checkpointing"),
        *("_is_hf_initialized", "_hf_quantized_needs_local_tp", "_output_capturing_hooks_installed", "_is_hooked"),
        *(
            "_use_kernels",
            "_weight_conversions",
            "_keys_to_ignore_on_load_missing",
            "_keys_to_ignore_on_load_unexpected",
        ),
        *("_hf_hook", "_old_forward", "_original_forward", "_original_call", "_is_accelerate_prepared"),
        *("_use_kernels", "_sync_gradients", "_is_torch_compile", "_peft_gradient_checkpointing_forward_hooks"),
    )
)
# What libraries' classes, and configs, have for trainings alone.
TRAINING_ONLY = re.compile(
    r"(.*_)?(?<!token_)(dropout|pdrop|layerdrop|drop_path|drop_prob)(_prob|_rate|_p)?"
    r"|(.*_)?initializer_(range|factor|std)|gradient_checkpointing"
)
OF_TRAININGS = ("inplace", "momentum")  # beside these, of torch's modules
# What transformers' ``dynamic_rope_update`` writes of a module, of those kinds of ``rope_type`` alone.
DYNAMIC_ROPE = ("dynamic", "longrope")
WRITTEN_OF_ROPE = ("inv_freq", "attention_scaling", "max_seq_len_cached")
MAKING = ("__init__", "__post_init__", "_init_weights", "reset_parameters")  # which no forward calls
# By which a script's code may read whichever attribute.
REFLECTIVE = ("__dict__", "vars", "getattr")
# The end of names of sums of floating-point numbers, and the name of code, whose bytecode is another in each Python.
VALUES, CODE = " values", f"code of Python {sys.version_info.major}.{sys.version_info.minor}"
HELD = " in code"  # the end of names of what code closes over or names
GOLDEN = 0.6180339887498949
CALLED = (*NAMED, functools.partial)
TOLERANCE = 1e-5  # of sums, relative to those of the sizes: devices differ in the last bits


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """What all modules hold, by attribute: fingerprints of numbers, texts, containers, functions' names and tensors of
    integers, of buffers that are not saved as of others, and of the modules' classes' names (``class``). Of
    floating-point tensors three sums, under the name and :data:`VALUES`, which :func:`are_close` compares. Of code that
    is no installed package's a fingerprint, as :data:`CODE`, and what it closes over and names, as :data:`HELD`.
    Without what libraries' classes hold for trainings, or write in a forward, and what a script's write and nothing
    reads."""
    found = _Found()
    modules = [(name, module, _class_of(module)) for name, module in walk(model) if not _is_of_parts(module)]
    for name, module, cls in modules:
        if not isinstance(module, WRAPPERS) and TRANSPARENT.isdisjoint(module._modules):
            found.add("class", name, cls.__qualname__)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            found.add_code("hooks", name, hook)
    classes = dict.fromkeys(cls for _, _, cls in modules)
    for cls in classes:
        found.add_code("class", "", cls)
    held = [(name, cls, attribute, value) for name, module, cls in modules for attribute, value in _held(module)]
    for name, cls, attribute, value in held:
        known = {id(part): part for parent in cls.__mro__ for part in vars(parent).values()}
        found.add_code(attribute, name, value, known if _is_method(cls, attribute, value) else {})
    written = _written(classes, found.functions)
    for name, cls, attribute, value in held:
        if attribute not in written[cls] and not _is_method(cls, attribute, value):
            found.add_value(attribute, name, value)
    return found.fingerprints()


def _is_method(cls: type, attribute: str, value: Any) -> bool:
    """Whether it takes the place of a method, as what has wrapped it does."""
    return isinstance(value, CALLED) and hasattr(cls, attribute)


class _Found:
    """Lines of what modules hold, and sums of floating-point tensors, by attribute."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {CODE: []}
        self.sums: dict[str, list[float]] = {}
        self.functions: set[types.FunctionType] = set()  # whose code was looked at

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
        held: list[tuple[str, Any]] = []
        seen = dict(known or {})
        if code := code_in(value, held, seen):
            self.add(CODE, f"{attribute} of {name}", json.dumps(code))
        for variable, part in held:
            self.add_value(f"{variable}{HELD}", f"{attribute} of {name}", part)
        self.functions |= {part for part in seen.values() if isinstance(part, types.FunctionType)}

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
    kind: Any = type(module)
    parents = [parent for parent in reversed(kind.__mro__) if issubclass(parent, nn.Module)]
    own = [vars(parent) for parent in parents if not is_installed(parent.__module__)]
    shared = {name: value for each in own for name, value in each.items() if not functions_in(value)}
    unsaved = module._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in module._buffers.items() if name in unsaved and buffer is not None}
    for name, value in {**shared, **vars(module), **buffers}.items():
        if name in OF_LIBRARIES or name[:2] == "__" or (name in ADDED and isinstance(module, CrossbarLayer)):
            continue
        if name == "p" and kind.__module__ == nn.Dropout.__module__:
            continue
        beside = name[:1] == "_" or name in OF_TRAININGS or TRAINING_ONLY.fullmatch(name)
        if not (beside and name in _of_libraries(kind)) and not _is_dynamic(module, name):
            yield name, value


@cache
def _of_libraries(cls: type) -> frozenset[str]:
    """Names of attributes that those parents of a class have or set that are of installed packages."""
    parents = [parent for parent in cls.__mro__ if is_installed(parent.__module__)]
    return frozenset(name for parent in parents for name in {*set_by(parent), *vars(parent)})


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


def _written(classes: Collection[type], functions: Collection[types.FunctionType]) -> dict[type, set[str]]:
    """Names of attributes that do not count, by class: those that libraries' methods set on their object where a
    forward runs them, which follow from the config, such as no code of a script's reads or sets; and those that a
    script's methods set such as no code at all reads.

    Args:
        functions: all that the classes and hooks name.
    """
    own = [function for function in functions if not _is_installed(function)]
    read = {name for function in own for name in reads(function.__code__)}
    named = {name for function in own for code in codes_of(function.__code__) for name in code.co_names}
    run, new = set(), {"forward"}
    while new:
        run |= new
        codes = [function.__code__ for cls in classes for name, function in _methods(cls) if name in new]
        new = {name for each in codes for code in codes_of(each) for name in code.co_names} - run - {*MAKING}
    found = {}
    for cls in classes:
        library, script, written = set(_remembered(cls)), set[str](), set[str]()
        for name, function in _methods(cls):
            names = sets(function.__code__) if name not in MAKING else ()
            if _is_installed(function):
                library.update(names if name in run else ())
            else:
                script.update(names)
                written.update(names if name in run else ())
        found[cls] = library - read - script
        if written and named.isdisjoint(REFLECTIVE):
            found[cls] |= written.difference(*(reads(function.__code__) for function in functions))
    return found


@cache
def _methods(cls: type) -> list[tuple[str, types.FunctionType]]:
    """All functions that a class and its parents have, of which ``super()`` may call each, by their names."""
    parts = [item for parent in cls.__mro__ if parent not in (nn.Module, object) for item in vars(parent).items()]
    return [(name, function) for name, part in parts for function in functions_in(part)]


@cache
def _remembered(cls: type) -> list[str]:
    """Names of cached properties of installed packages' classes."""
    parents = [parent for parent in cls.__mro__ if is_installed(parent.__module__)]
    return [
        name for each in parents for name, part in vars(each).items() if isinstance(part, functools.cached_property)
    ]


def _is_installed(function: types.FunctionType) -> bool:
    return is_installed(function.__globals__.get("__name__"))
