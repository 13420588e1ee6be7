"""Weights of crossbars that something computes with itself, beside their layers: what it makes of them is digital."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn.places import Part, parameter_of
from .find import crossbar_layers

# What is asked of a weight without computing with it.
ASKED = frozenset(
    (
        *("size", "dim", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "is_pinned", "is_shared", "is_signed"),
        *("__len__", "__hash__", "__repr__", "requires_grad_", "retain_grad", "register_hook"),
    )
)
READ = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that are the weight


class WeightReads(TorchFunctionMode):
    """While it is entered, notes which crossbars' weights any function of torch is given. Layers on a chip need none:
    their cells hold what they compute with. Nothing is seen of compiled code, nor of what is computed with a copy.

    Args:
        model: patched.

    Attributes:
        found: by name of the layers, what was first given their weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # What is stacked in a parameter is taken out of it for its layers.
        whole = {name: layer for name, layer in crossbar_layers(model).items() if not isinstance(layer, Part)}
        self.names = {id(weight): name for name, layer in whole.items() if (weight := parameter_of(layer)) is not None}
        self.states = list({layer.crossbar for layer in crossbar_layers(model).values()})
        self.found: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not torch.compiler.is_compiling() and _computes(func):
            for name in self._names((*args, *(kwargs or {}).values())):
                if not any(state.digital for state in self.states):
                    self.found.setdefault(name, _name_of(func))
        return func(*args, **(kwargs or {}))

    def _names(self, values: Iterable[Any]) -> list[str]:
        each = [part for value in values for part in (value if isinstance(value, (list, tuple)) else (value,))]
        return [self.names[id(part)] for part in each if id(part) in self.names]


def _name_of(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    getter = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")
    return getattr(owner if getter else func, "__name__", str(func))


def _computes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _name_of(func) in READ
    return name not in ASKED and name not in ("__set__", "__delete__")
