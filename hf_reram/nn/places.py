"""Where a layer's weight is stored: in its own parameter, or as a part of a parameter of the module that it is in."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Part(nn.Module):
    """A linear layer whose weight is a part of a parameter of the module that holds it: x (..., rows) to
    (..., columns).

    Args:
        holder: the module.
        weight: name of its parameter. bias: the same, None for no bias.
        index: of the part in the parameter's first dimension, a number or a slice. bias_index: the same of the bias,
            None for the same one.
        transposed: the weight lies there as (rows, columns).
    """

    lent: Any = None  # weight and bias within a forward of the holder, see :func:`.parts.lent`

    def __init__(
        self,
        holder: nn.Module,
        weight: str,
        index: int | slice,
        bias: str | None = None,
        transposed: bool = False,
        bias_index: int | slice | None = None,
    ):
        super().__init__()
        self.holder: Any
        self.__dict__["holder"] = holder  # no child of its own
        self.stored_as: dict[str, Any] = {"weight": weight, "bias": bias}
        self.index, self.transposed = index, transposed
        self.bias_index = index if bias_index is None else bias_index

    @property
    def weight(self) -> Any:
        """(columns, rows)."""
        part = getattr(self.holder, self.stored_as["weight"])[self.index] if self.lent is None else self.lent[0]
        return part.mT if self.transposed else part

    @property
    def bias(self) -> Any:
        """(columns,), or None."""
        name = self.stored_as["bias"]
        if name is None:
            return None
        return getattr(self.holder, name)[self.bias_index] if self.lent is None else self.lent[1]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.stored_as['weight']}[{self.index}]"


def place(layer: Any, name: str = "weight") -> tuple[Any, str | None]:
    """The module that has the parameter which a layer's weight (or bias) is or is a part of, and its name there."""
    return (layer.holder, layer.stored_as[name]) if isinstance(layer, Part) else (layer, name)


def parameter_of(layer: Any, name: str = "weight") -> Any:
    """That parameter; None where there is none, such as for a weight that is computed."""
    module, key = place(layer, name)
    return module._parameters.get(key)


def is_trained(layer: Any) -> bool:
    """Whether a layer's weight has a gradient; that of a part has none outside of autograd."""
    found = parameter_of(layer) if isinstance(layer, Part) else None
    return (layer.weight if found is None else found).requires_grad
