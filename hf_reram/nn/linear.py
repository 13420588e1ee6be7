"""Fully connected layers on crossbars: ``nn.Linear`` and GPT-2's ``Conv1D``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layer import CrossbarLayer
from .registry import register_crossbar


@register_crossbar(nn.Linear)
@register_crossbar("timm.Linear")
@register_crossbar("transformers.FalconLinear")
class CrossbarLinear(CrossbarLayer, nn.Linear):
    """``nn.Linear`` on a crossbar: x (..., in_features) to (..., out_features)."""

    output_dim, input_dim, channel_dim = 0, 1, -1

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        return F.linear(x, weight, bias)


@register_crossbar(Conv1D)
class CrossbarConv1D(CrossbarLayer, Conv1D):
    """GPT-2's ``Conv1D``, a linear layer with a transposed weight: x (..., nx) to (..., nf)."""

    output_dim, input_dim, channel_dim = 1, 0, -1

    def forward(self, x: Tensor) -> Tensor:
        return CrossbarLayer.forward(self, x)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], self.nf)
