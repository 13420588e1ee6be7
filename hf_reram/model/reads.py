"""Weights of crossbars that something computes with itself, beside their layers: what it makes of them is digital."""

import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn.array import bit_sum
from ..nn.places import Part, parameter_of
from .find import crossbar_layers, crossbar_states, is_digital

# What is asked of a weight without computing with it, attributes aside.
ASKED = frozenset(
    (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr"),
        *("get_device", "is_contiguous", "is_floating_point", "is_complex", "is_inference", "is_pinned", "is_shared"),
        *("is_signed", "is_same_size", "result_type", "untyped_storage", "_has_compatible_shallow_copy_type"),
        *("__len__", "__hash__", "__repr__"),
        *("retain_grad", "register_hook", "new", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"),
        *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
    )
)
# What a chip does where the model is moved.
LOOKS_FOR_CHANGES: Any = bit_sum.__wrapped__.__code__  # type: ignore[attr-defined]
# What gives the weight itself, or a copy: attributes, and functions of it.
ATTRIBUTES = frozenset(("data", "T", "mT", "H", "mH", "real"))
PASSED = frozenset(
    (
        *("to", "cpu", "cuda", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "detach", "detach_"),
        *("contiguous", "requires_grad_", "t", "transpose", "permute", "view", "view_as", "reshape", "reshape_as"),
        *("flatten", "squeeze", "unsqueeze", "expand", "expand_as", "adjoint", "swapaxes", "movedim", "pin_memory"),
    )
)


# What computes outputs of layers, and not figures of the weights by themselves, such as norms.
PRODUCTS = re.compile(r"linear|.*matmul.*|.*mm(_|$)|mv|addmv|einsum|conv\w*|tensordot|inner|dot|chain_matmul|multi_dot")


class WeightReads(TorchFunctionMode):
    """While it is entered, notes which crossbars' weights functions of torch compute with within forwards of the model,
    and outside of them what multiplies by them, or by what was made of them element by element, as their normalized
    rows are. Layers on a chip do not: their cells hold what they compute with. Nothing is seen of compiled code, of
    what is digital, nor of copies that were made before.

    Args:
        model: patched.

    Attributes:
        found: by name of the layers, the first function that got their weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.found = model, dict[str, str]()
        self._states = crossbar_states(model)
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # of weights and what was made of them, by id
        for name, layer in crossbar_layers(model).items():
            weight = None if isinstance(layer, Part) else parameter_of(layer)  # parts are taken out of their stack
            if weight is not None:
                self._names[id(weight)] = weakref.ref(weight), name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return result
        name, is_attribute = _name_of(func)
        if (is_attribute and name not in ATTRIBUTES) or name in ASKED:
            return result
        passes = is_attribute or name in PASSED
        values = list(_tensors(args[:1] if passes else (*args, *(kwargs or {}).values())))
        layers = {layer: value for value in values if (layer := self._layer(value)) is not None}
        if not layers or sys._getframe(1).f_code is LOOKS_FOR_CHANGES:
            return result
        # A product of weights alone is no output yet, as that of an adapter's two is none.
        meets_others = any(self._layer(value) is None for value in values)
        computes = any(state.running for state in self._states) or (PRODUCTS.fullmatch(name) and meets_others)
        if not passes and computes and not is_digital(self.model):
            for layer in layers:
                self.found.setdefault(layer, name)
        elif isinstance(result, Tensor):
            layer, weight = next(iter(layers.items()))
            if passes or not meets_others or result.shape == weight.shape:
                self._names[id(result)] = weakref.ref(result), layer
        return result

    def _layer(self, value: Tensor) -> str | None:
        """The layer whose weight it is, or is made of."""
        ref, name = self._names.get(id(value), (None, None))
        return name if ref is not None and ref() is value else None


def _tensors(values: tuple) -> Iterator[Tensor]:
    for value in values:
        yield from (
            part for part in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(part, Tensor)
        )


def _name_of(func: Any) -> tuple[str, bool]:
    """A function's name, or that of the attribute that it gets or sets."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else "", True
    return name, False
