"""A loss term that leaves its layer on the layer's own output.

A term that reaches the loss as a side output breaks FSDP2: its graph would run before the layer's weight is gathered
again. Instead the layer's output carries it: ``y = Attach.apply(y, term, scale)`` is the identity, and its backward
hands ``term`` the gradient that ``scale`` holds by then. ``loss = Add.apply(task_loss, value, weight, scales,
gradients)`` adds the terms' detached value; its backward runs before any layer's and fills the scales. So loss scaling,
accumulation and checkpointing are right by construction.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function


def _clear(scales: list[Tensor]) -> None:
    for scale in scales:
        scale.zero_()


class Attach(Function):
    """Identity on ``y``; in backward ``term`` receives ``scale`` as its gradient.

    Args:
        y: any shape. term: (2,). scale: (2,), shared with :class:`Add`.
    """

    @staticmethod
    def forward(ctx, y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
        # Not save_for_backward: Add changes it in place between the two passes, on purpose.
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.scale.clone(), None


class Add(Function):
    """``task_loss + weight · value``; in backward fills each layer's scale with the gradient of its term.

    Args:
        task_loss, value: scalars. weight: float.
        scales: one (2,) tensor a layer, as in :class:`Attach`.
        gradients: (layers, 2), the gradient of ``value`` with respect to each layer's term.
    """

    @staticmethod
    def forward(ctx, task_loss: Tensor, value: Tensor, weight: float, scales: list, gradients: Tensor) -> Tensor:
        ctx.scales, ctx.weight = scales, weight
        ctx.save_for_backward(gradients)
        return task_loss + weight * value.to(task_loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradients,) = ctx.saved_tensors
        filled = gradients * (ctx.weight * grad.detach())
        with torch.no_grad():
            for scale, row in zip(ctx.scales, filled):
                scale.copy_(row)
        # At the end of this backward pass: a later forward whose terms are not added must not find them.
        torch.autograd.Variable._execution_engine.queue_callback(partial(_clear, ctx.scales))
        return grad, None, None, None, None
