"""Fully connected layers on crossbars: ``nn.Linear`` and GPT-2's ``Conv1D``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layer import CrossbarMixin
from .ops.power import Pull, input_power


class _Matrix(CrossbarMixin):
    """A layer whose crossbar is one matrix: rows are input features."""

    fuses_offset = True
    rows_dim: int  # the weight's dimension of crossbar rows

    def _input_power(self, s: Tensor, pull: Pull | None) -> Tensor:
        return input_power(s.reshape(-1, s.shape[-1]), self.crossbar.keep(s), pull)[None]

    def _output_rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, y.shape[-1])

    def _tiles(self, s: Tensor, weight: Tensor):
        if self.tiles() == 1:  # splitting costs a copy in the backward
            return [(s, weight)]
        return zip(s.split(self.tile_rows(), -1), weight.split(self.tile_rows(), self.rows_dim))


class CrossbarLinear(_Matrix, nn.Linear):
    """``nn.Linear`` on a crossbar: x (..., in_features) to (..., out_features)."""

    rows_dim = 1

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(s, weight, bias)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight[None]

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def _width(self) -> int:
        return self.in_features

    def _broadcast(self, per_channel: Tensor, like: str) -> Tensor:
        return per_channel[:, None] if like == "weight" else per_channel

    def _along_inputs(self, per_channel: Tensor) -> Tensor:
        return per_channel


class CrossbarConv1D(_Matrix, Conv1D):
    """GPT-2's ``Conv1D``, a linear layer with a transposed weight: x (..., nx) to (..., nf)."""

    rows_dim = 0

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = s.reshape(-1, s.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*s.shape[:-1], self.nf)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.t()[None]

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t()

    def _width(self) -> int:
        return self.nx

    def _broadcast(self, per_channel: Tensor, like: str) -> Tensor:
        return per_channel

    def _along_inputs(self, per_channel: Tensor) -> Tensor:
        return per_channel[:, None]
