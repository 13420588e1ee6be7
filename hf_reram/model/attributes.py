"""What a forward may read of a model that neither its state dict nor its config holds: buffers that are not saved, the
plain attributes of its modules, and code of a script's own."""

import argparse
import functools
import hashlib
import json
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ..device.checks import is_finite
from ..nn import CrossbarLayer
from ..nn.layer import ADDED
from ..nn.parts import Holder
from ..nn.places import Part
from ..nn.tensors import whole
from .code import MAKING, functions_in, module_of, names_in, of_libraries, own_functions, reads, reads_any, sets
from .description import Description, is_own
from .find import TRANSPARENT, WRAPPERS, walk
from .injected import hooks_of, hooks_of_all, put_in_place, registered
from .installed import is_installed
from .settings import TRAINING_ONLY, is_config, parts_of, telling

# What torch has on every module, and what this package, torch, transformers, accelerate, peft and timm put on modules
# from outside: it says nothing of an evaluation, or where a model is from.
OF_LIBRARIES = frozenset(
    (
        *vars(nn.Module()),
        *("_digital_class", "_closed_class", "_part_names", "_crossbar_hooks", "_was_inplace", "_switched"),
        *("_ddp_params_and_buffers_to_ignore", "_param_name_to_source", "_distribute_module_applied"),
        *("name_or_path", "pretrained_cfg", "default_cfg", "model_card_data", "model_tags", "warnings_issued"),
        *("is_quantized", "quantization_method", "hf_quantizer", "_hf_quantized_needs_local_tp", "hf_device_map"),
        *("gradient_checkpointing", "_gradient_checkpointing_func", "checkpointing_function", "grad_checkpointing"),
        *("_is_hf_initialized", "_output_capturing_hooks_installed", "_is_hooked", "_weight_conversions"),
        *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_use_kernels"),
        *("_hf_hook", "_old_forward", "_original_forward", "_original_call", "_is_accelerate_prepared"),
        *("_sync_gradients", "_is_torch_compile", "peft_config", "_peft_gradient_checkpointing_forward_hooks"),
    )
)
# What torch's modules, beside what :data:`.settings.TRAINING_ONLY` names, have for trainings alone.
OF_TRAININGS = ("inplace", "momentum")
# What transformers' ``dynamic_rope_update`` writes of a module, of those kinds of ``rope_type`` alone.
DYNAMIC_ROPE = ("dynamic", "longrope")
WRITTEN_OF_ROPE = ("inv_freq", "attention_scaling", "max_seq_len_cached")
WRAPPING = TRANSPARENT - {"base_layer"}  # but PEFT's layers, what wraps says nothing of an evaluation
# The end of names of sums of floating-point numbers, of what nothing tells from others, and of what code closes over or
# names; and the name of code, whose bytecode is another in each Python.
VALUES, UNTOLD, HELD = " values", " untold", " in code"
CODE = f"code of Python {sys.version_info.major}.{sys.version_info.minor}"
GOLDEN = 0.6180339887498949
TOLERANCE = 1e-5  # of sums, relative: devices differ in the last bits
HUGE = 5432.1  # larger numbers, as of masks, would hide the others in a sum; not 10^4, which devices may round


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """What all modules hold, by attribute: fingerprints of all but floating-point tensors, of buffers that are not
    saved as of others, of the modules' classes' names (``class``), and of each entry of a config, unless it is the
    config that :func:`.digest.settings_of` tells. Of floating-point tensors sums, under the name and :data:`VALUES`,
    which :func:`are_close` compares. Of code that is no installed package's a fingerprint, as :data:`CODE`, and of what
    it closes over and names, as :data:`HELD`. What nothing tells from others has its kind, as :data:`UNTOLD`. Without
    what libraries' classes hold for trainings, or write in a forward, and what a script's write and nothing reads."""
    modules = [(name, module, _class_of(module)) for name, module in walk(model) if not _is_of_parts(module)]
    told = {id(part) for config in configs_of(model).values() for part in parts_of(config)}
    found = _Found({id(module): name for name, module in walk(model)})
    classes = dict.fromkeys(cls for _, _, cls in modules)
    code: list[tuple[str, str, _Described]] = []
    code += [("class", "", found.described(cls, "")) for cls in classes]
    code += [(name, "", found.described(part, name)) for cls in classes for name, part in put_in_place(cls)]
    code += [("hooks", "", found.described(hook, "hooks")) for hook in hooks_of_all()]
    configs = {id(config): config for _, module, _ in modules if (config := getattr(module, "config", None))}
    chosen = dict.fromkeys(each for config in configs.values() for each in registered(config))
    code += [(attribute, "", found.described(part, attribute)) for attribute, part in chosen]
    values: list[tuple[type, str, str, _Described]] = []
    for name, module, cls in modules:
        if not isinstance(module, WRAPPERS) and TRANSPARENT.isdisjoint(module._modules):
            found.add("class", name, cls.__qualname__)
        code += [("hooks", name, found.described(hook, "hooks")) for hook in hooks_of(module)]
        for attribute, value in _held(module):
            if is_config(value):
                for key, part in () if id(value) in told else telling(value).items():
                    found.add(f"{attribute}.{key}", name, json.dumps(part, sort_keys=True, default=str))
            elif not _is_method(cls, attribute, value):
                by_library = is_installed(cls.__module__)
                values.append((cls, attribute, name, found.described(value, attribute, by_library)))
            elif is_own(value) or not {function for _, function in _methods(cls)}.issuperset(own_functions(value)):
                code.append((attribute, name, found.described(value, attribute)))
    found.read_arguments([*(each[-1] for each in code), *(each[-1] for each in values)])
    for attribute, name, described in code:
        found.add_code(attribute, name, described)
    written = _written(classes, found.functions)
    for cls, attribute, name, described in values:
        if attribute not in written[cls]:
            found.add_told(attribute, name, described.value, described.told, described.floats)
            found.add_parts(attribute, name, described)
    return found.fingerprints()


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The configs of a Hugging Face model, or of those inside, by the models' names."""
    found: dict[str, Any] = {}
    inside: set[nn.Module] = set()
    for name, module in walk(model):
        config = getattr(module, "config", None)
        if callable(getattr(config, "to_dict", None)) and module not in inside:
            inside |= set(module.modules())
            found[name] = config
    return found


def _is_method(cls: type, attribute: str, value: Any) -> bool:
    """Whether it takes the place of a method, as what has wrapped it does."""
    return callable(value) and any(name == attribute for name, _ in _methods(cls))


class _Described(Description):
    """A value that modules hold. Of floating-point tensors only the shapes are told, since devices differ in their last
    bits; of code nothing, and of the variables that it reads their names: the caller gets them apart. What JSON keeps
    alike is the same, since configs are kept in it, and so are devices.

    Attributes:
        floats: tensors in it. codes: bytecode. variables_read: by code, each with what tells it and its tensors.
            kinds_untold: of what nothing tells from others.

    Args:
        label: the attribute that it is. places: modules' names by their ids. functions: gets a script's.
        by_library: whether an installed package's module holds it. Of a namespace of arguments that a script's own
            holds, the attributes count that its code reads.
    """

    as_json = True

    def __init__(
        self,
        value: Any,
        label: str,
        places: dict[int, str],
        functions: dict[types.FunctionType, None],
        by_library: bool,
    ) -> None:
        super().__init__()
        self.value, self.label, self.places, self.functions = value, label, places, functions
        self.by_library = by_library
        self.floats: list[torch.Tensor] = []
        self.codes: list[Any] = []
        self.variables_read: list[tuple[str, Any, Any, list[torch.Tensor]]] = []
        self.kinds_untold: list[str] = []
        self.told = self.known_or_untold(value)

    def known_or_untold(self, value: Any) -> Any:
        try:
            return self.of(value)
        except Exception as error:  # whatever its parts raise
            return self.untold(value, str(error))

    def held(self, name: str, value: Any) -> None:
        around, self.floats = self.floats, []
        self.variables_read.append((name, value, self.known_or_untold(value), self.floats))
        self.floats = around

    def parts(self, value: Any) -> list:
        return ["device"] if isinstance(value, torch.device) else super().parts(value)

    def code(self, value: types.CodeType) -> list:
        self.codes.append(super().code(value))
        return ["code"]

    def tensor(self, value: torch.Tensor) -> list:
        if value.is_meta or not (value.is_floating_point() or value.is_complex()):
            return super().tensor(value)
        values = whole(value.detach())
        values = values if values.layout == torch.strided else values.to_dense()
        self.floats.append(torch.view_as_real(values) if values.is_complex() else values)
        return ["floats", list(values.shape)]

    def array(self, value: np.ndarray) -> list:
        if value.dtype.kind not in "fc" or value.dtype.itemsize > np.dtype(complex).itemsize:
            return super().array(value)
        return self.tensor(torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))))

    def object(self, value: Any) -> list:
        if value is self.value and type(value) is argparse.Namespace and not self.by_library:
            return self.read_of(value, vars(value), {})
        return super().object(value)

    def settings(self, value: Any) -> dict[str, Any]:
        return telling(value) if is_config(value) else super().settings(value)

    def module(self, value: nn.Module) -> list:
        if id(value) in self.places:
            return ["module", self.places[id(value)]]
        found = []  # of one that is in a list, or that code closes over
        for name, module in walk(value):
            cls = _class_of(module)
            numbers = {**module._parameters, **module._buffers}
            held = {key: part for key, part in _held(module) if key not in numbers and not _is_method(cls, key, part)}
            found.append([name, self.of(cls), {key: self.of(part) for key, part in {**numbers, **held}.items()}])
        return found

    def untold(self, value: Any, why: str) -> list:
        self.kinds_untold.append(self.name(type(value)))
        return ["untold", self.name(type(value))]


class _Found:
    """Lines of what modules hold, and sums of floating-point tensors, by attribute.

    Args:
        places: modules' names by their ids.
    """

    def __init__(self, places: dict[int, str] | None = None) -> None:
        self.places = places or {}
        self.lines: dict[str, list[str]] = {CODE: []}
        self.sums: dict[str, dict[str, Any]] = {}
        self.counts: dict[tuple[str, str], int] = {}  # of tensors of an attribute in one place
        self.functions: dict[types.FunctionType, None] = {}  # whose code was looked at

    def described(self, value: Any, label: str, by_library: bool = False) -> _Described:
        return _Described(value, label, self.places, self.functions, by_library)

    def read_arguments(self, described: Collection[_Described]) -> None:
        """Tell those attributes of namespaces of arguments that any code reads, also that of other values."""
        known = -1
        while known < len(self.functions):
            known = len(self.functions)
            for each in described:
                each.arguments_read()

    def add(self, attribute: str, name: str, line: str) -> None:
        self.lines.setdefault(attribute, []).append(f"{name} {line}")

    def add_code(self, attribute: str, name: str, found: _Described) -> None:
        if not isinstance(found.value, type):
            self.add_told(f"{attribute}{HELD}", name, found.value, found.told, found.floats)
        self.add_parts(attribute, name, found)

    def add_parts(self, attribute: str, name: str, found: _Described) -> None:
        if found.codes:
            self.add(CODE, f"{attribute} of {name}", json.dumps(found.codes))
        for variable, value, told, floats in found.variables_read:
            self.add_told(f"{variable}{HELD}", f"{attribute} of {name}", value, told, floats)
        for kind in found.kinds_untold:
            self.add(f"{attribute}{UNTOLD}", name, kind)

    def add_told(self, attribute: str, name: str, value: Any, told: Any, floats: Sequence[torch.Tensor]) -> None:
        alone = isinstance(value, (torch.Tensor, np.ndarray)) and len(floats) > 0
        if not alone and not _is_empty(value):
            self.add(attribute, name, json.dumps(told))
        for tensor in floats:
            sums = self.sums.setdefault(f"{attribute}{VALUES}", {})
            count = self.counts[attribute, name] = self.counts.get((attribute, name), 0) + 1
            place = f"{name} {count - 1}" if count > 1 else name
            sums[place] = _sums(tensor, place)

    def fingerprints(self) -> dict[str, Any]:
        hashes = {
            attribute: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
            for attribute, lines in self.lines.items()
        }
        return dict(sorted({**hashes, **self.sums}.items()))


NO_CODE = _Found().fingerprints()[CODE]  # what is told of models of libraries alone


def _sums(tensor: torch.Tensor, name: str) -> list[Any]:
    """A fingerprint of where the huge numbers (:data:`HUGE`), infinities and NaN are. Then of all other numbers, and of
    the huge ones of each four powers of ten by themselves: how many, their sizes' sum, the root of their squares', and
    the sum of the numbers times weights of their places, other ones for each name: rounding moves the last by a share
    of the root alone, in which one number of many does not vanish."""
    values = tensor.cpu().reshape(-1).double()
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
    weights = torch.arange(first, first + values.numel(), dtype=torch.float64).mul_(GOLDEN).sin_()

    def sums(numbers: torch.Tensor, weights: torch.Tensor) -> list[float]:
        return [float(numbers.numel()), float(numbers.abs().sum()), float(numbers.norm()), float(numbers @ weights)]

    rest = values.abs() < HUGE
    if rest.all():
        return ["", sums(values, weights)]
    huge, of_huge = values[~rest], weights[~rest]
    kinds = huge.abs().div_(HUGE).log10_().div_(4).floor_()
    kinds[huge.isnan()], kinds[huge == torch.inf], kinds[huge == -torch.inf] = 101, 102, 103
    where = hashlib.sha256(rest.numpy().tobytes() + kinds.to(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    finite = [sums(huge[kinds == kind], of_huge[kinds == kind]) for kind in kinds[kinds <= 100].unique()]
    return [where, sums(values[rest], weights[rest]), *finite]


def are_close(one: Any, other: Any) -> bool:
    """Whether the sums of two attributes, by module, are of the same numbers but for their last bits."""
    if not (isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys()):
        return False
    return all(_are_close(one[name], other[name]) for name in one)


def _are_close(one: Any, other: Any) -> bool:
    if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other) and one[:1] == other[:1]):
        return False
    for mine, theirs in zip(one[1:], other[1:]):
        both = (mine, theirs)
        if not all(isinstance(sums, list) and len(sums) == 4 and all(map(is_finite, sums)) for sums in both):
            return False
        allowed = [0.0, *(TOLERANCE * max(mine[at], theirs[at]) for at in (1, 2, 2))]
        if any(abs(a - b) > most for a, b, most in zip(mine, theirs, allowed)):
            return False
    return True


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The module's attributes that may count, buffers that are not saved and what its class has for all among them."""
    kind: Any = type(module)
    if isinstance(module, WRAPPERS) or not WRAPPING.isdisjoint(module._modules):
        return
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
        if not (beside and name in of_libraries(kind)) and not _is_dynamic(module, name):
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


def _written(classes: Collection[type], functions: Collection[types.FunctionType]) -> dict[type, set[str]]:
    """Names of attributes that do not count, by class: those that libraries' methods set on their object where a
    forward runs them, which follow from the config, such as no code of a script's reads or sets; and those that a
    script's methods set such as no code at all reads.

    Args:
        functions: all that the classes and hooks name.
    """
    every = {*functions, *(function for cls in classes for _, function in _methods(cls))}
    own = [function for function in every if not _is_installed(function)]
    read = {name for function in own for name in reads(function.__code__)}
    reads_all = any(reads_any(function.__code__) for function in own)
    run, new = set(), {"forward"}
    while new:
        run |= new
        codes = [function.__code__ for cls in classes for name, function in _methods(cls) if name in new]
        new = {name for each in codes for name in names_in(each)} - run - {*MAKING}
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
        if written and not reads_all:
            found[cls] |= written.difference(*(reads(function.__code__) for function in every))
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
    return is_installed(module_of(function))
