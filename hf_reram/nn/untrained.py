"""A chip is programmed: it gets no gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .tensors import tensors_of


def refuse_training(y: Tensor, weight: Tensor) -> Tensor:
    """The output of a chip in training mode, a backward through which fails.

    Raises:
        RuntimeError: in the forward under torch.compile, where a backward is traced with it.
    """
    if not (y.requires_grad or weight.requires_grad):
        return y
    if torch.compiler.is_compiling():
        _refuse()
    return _Untrained.apply(y, weight)


def refuse_backward(outputs: Any) -> None:
    """Of a model in training mode that is deployed: also where no crossbar is on the way to what would be trained."""
    for tensor in tensors_of(outputs):
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: _refuse())


class _Untrained(Function):
    """A copy, which the model may change in place. Of the weight, so that it is part of a graph in any case."""

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse()


def _refuse() -> None:
    raise RuntimeError(
        "the model is deployed as a chip, whose cells are programmed and get no gradient: train outside of deploy; for "
        "gradients of a chip's inputs call model.eval() first"
    )
