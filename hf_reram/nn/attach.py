"""A loss term that leaves its layer on the layer's own output (DESIGN §5).

A term that reaches the loss as a side output breaks FSDP2: its graph would run before the layer's weight is gathered
again. Instead the layer's output carries it: ``y = Attach.apply(y, term, scale)`` is the identity, and its backward
hands ``term`` the gradient ``scale``. ``loss = Add.apply(task_loss, value, scale, weight)`` adds the terms' detached
value; its backward runs before any layer's and writes ``scale = d(loss)/d(value)``. So loss scaling, accumulation and
checkpointing are right by construction.
"""

import torch
from torch import Tensor
from torch.autograd import Function


class Attach(Function):
    """Identity on ``y``; in backward ``term`` receives the gradient that ``scale`` holds by then.

    Args:
        y: any shape. term: scalar. scale: tensor with one element, shared with :class:`Add`.
    """

    @staticmethod
    def forward(ctx, y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
        # Not save_for_backward: Add changes it in place between the two passes, on purpose.
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.scale.reshape(()), None


class Add(Function):
    """``task_loss + weight · value``; in backward writes the gradient of one term into ``scale``.

    Args:
        task_loss, value: scalars. scale: as in :class:`Attach`. weight: float. count: how many terms ``value`` is
            the mean of.
    """

    @staticmethod
    def forward(ctx, task_loss: Tensor, value: Tensor, scale: Tensor, weight: float, count: float) -> Tensor:
        ctx.scale, ctx.factor = scale, weight / count
        return task_loss + weight * value.to(task_loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.no_grad():
            ctx.scale.copy_(grad.detach() * ctx.factor)
        return grad, None, None, None, None
