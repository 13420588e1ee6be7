"""Powers of a layer's input and output, whose gradients cost no pass of their own.

The gradient of ``Σ s²`` is a multiple of ``s`` itself. Instead of a tensor of that size, which autograd would then have
to add to the gradient that comes from the matrix product, a power's backward leaves the multiple in a :class:`Pull`;
the function that made ``s``, which autograd runs after all that read it, adds it in the pass that it makes anyway.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import row_pieces
from .reference import row_power


class Pull:
    """``gradient of s += amount · keep · s``, on its way from powers of s to where s was made.

    Attributes:
        power: the power of s that was already computed, for a layer that reads the same s.
    """

    def __init__(self) -> None:
        self.power: Tensor | None = None
        self._amount: Any = None
        self._keep: Tensor | None = None
        self._task = -1

    def add(self, amount: Tensor, keep: Tensor | None) -> None:
        task = torch._C._current_graph_task_id()
        if self._task != task:  # what an earlier, partial backward pass left is not of this one
            self._amount = None
        self._amount = amount if self._amount is None else self._amount + amount
        self._keep, self._task = keep, task

    def take(self) -> tuple[Tensor, Tensor | None] | None:
        """``(amount, keep)`` once, or None if no power has a gradient in this backward pass."""
        amount, self._amount = self._amount, None
        return None if amount is None or self._task != torch._C._current_graph_task_id() else (amount, self._keep)


class InputPower(Function):
    """``sum_n k_n s_n²``, for each element of a row of ``s``, at least in float32.

    Args:
        s: (rows, ...). keep: (rows,) of 0 and 1, or None for all rows.
        pull: of the function that made s; None computes the gradient of s here.

    Returns:
        of the shape of a row.
    """

    @staticmethod
    def forward(ctx, s: Tensor, keep: Tensor | None, pull: Pull | None) -> Tensor:
        ctx.pull = pull
        ctx.save_for_backward(keep, s if pull is None else None)
        if pull is not None and pull.power is not None:
            return pull.power.clone()
        dtype = torch.promote_types(s.dtype, torch.float32)
        if s.device.type != "cpu" or s.dtype != dtype:
            power = (s.to(dtype).square() if keep is None else s.to(dtype).square() * _rows_like(keep, s)).sum(0)
        else:
            power = torch.zeros(s.shape[1:], dtype=dtype)
            for part, square in row_pieces(s):
                torch.mul(s[part], s[part], out=square)
                if keep is None:
                    power += square.sum(0)
                else:
                    power += (keep[part].to(dtype) @ square.flatten(1)).view_as(power)
        if pull is not None:
            pull.power = power.clone()
        return power

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        keep, s = ctx.saved_tensors
        if ctx.pull is not None:
            ctx.pull.add(2 * grad, keep)
            return None, None, None
        result = s * (2 * grad).to(s.dtype)
        return (result if keep is None else result.mul_(_rows_like(keep, s))), None, None


def input_power(s: Tensor, keep: Tensor | None, pull: Pull | None) -> Tensor:
    """:class:`InputPower`, or what stands for it under ``torch.compile``."""
    return row_power(s, keep) if torch.compiler.is_compiling() else InputPower.apply(s, keep, pull)


class Tap(Function):
    """Identity on a layer's output y, whose backward adds what :class:`OutputPower` left in ``pull``.

    The bias shifts y but not its power, so its gradient is taken here, before that is added: y must have been computed
    with ``bias.detach()``.

    Args:
        y: (rows, ...). bias: broadcastable to a row, or None; y - bias is the power's signal. pull: a new one.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor | None, pull: Pull) -> Tensor:
        ctx.save_for_backward(y, bias)
        ctx.pull = pull
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, bias = ctx.saved_tensors
        pulled = ctx.pull.take()
        grad_bias = grad.sum_to_size(bias.shape) if ctx.needs_input_grad[1] else None
        return grad if pulled is None else _power_gradient(grad, y, bias, *pulled), grad_bias, None


class OutputPower(Function):
    """``sum_n k_n |y_n - bias|²``: the power of a layer's output without its digital bias, at least in float32.

    Args:
        y: (rows, ...). bias: broadcastable to a row, or None. keep: (rows,) of 0 and 1, or None for all rows.
        pull: that of the :class:`Tap` which y has gone through; None computes the gradients here.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor | None, keep: Tensor | None, pull: Pull) -> Tensor:
        ctx.save_for_backward(keep, *((y, bias) if pull is None else (None, None)))
        ctx.pull = pull
        dtype = torch.promote_types(y.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=y.device)
        for part, signal in _pieces(y, dtype):
            _signal(y[part], bias, signal)
            if keep is not None:
                signal.mul_(_rows_like(keep[part], y))
            row = signal.view(-1)
            total += torch.dot(row, row)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        keep, y, bias = ctx.saved_tensors
        if ctx.pull is not None:
            ctx.pull.add(2 * grad, keep)
            return None, None, None, None
        result = _power_gradient(None, y, bias, 2 * grad, keep)
        return result, -result.sum_to_size(bias.shape) if ctx.needs_input_grad[1] else None, None, None


def _signal(y: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return out.copy_(y)
    return torch.sub(y, bias, out=out) if y.dtype == out.dtype else out.copy_(y).sub_(bias)


def _power_gradient(grad: Tensor | None, y: Tensor, bias: Tensor | None, amount: Tensor, keep: Tensor | None) -> Tensor:
    """``grad + amount · keep · (y - bias)``."""
    result = torch.empty_like(y)
    amount = amount.to(y.dtype)
    for part, signal in _pieces(y):
        _signal(y[part], bias, signal)
        if keep is not None:
            signal.mul_(_rows_like(keep[part], y))
        out = result[part]
        torch.mul(signal, amount, out=out) if grad is None else torch.addcmul(grad[part], signal, amount, out=out)
    return result


def _pieces(y: Tensor, dtype: torch.dtype | None = None):
    """As :func:`hf_reram.nn.chunks.row_pieces` on CPU; the whole tensor elsewhere."""
    if y.device.type != "cpu":
        yield slice(None), torch.empty(y.shape, device=y.device, dtype=dtype or y.dtype)
    else:
        yield from row_pieces(y, dtype)


def _rows_like(keep: Tensor, y: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (y.dim() - 1)).to(y.dtype)
