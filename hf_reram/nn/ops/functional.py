"""The autograd functions of the converters and of the I-V curve. Their cost is their passes over memory (see
:mod:`.chunks`)."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...device.iv import LINEAR_B, sinh_coefficients
from . import fused
from .chunks import chunkable, constants, odd_polynomial_, pieces, row_slices, scratch
from .power import Pull

# Up to this b a polynomial replaces sinh on CPU, where torch's float32 sinh is scalar code, 20 times slower.
POLYNOMIAL_B = 4.0

Limits = tuple[float, float]


def _drive_(t: Tensor, bound: float, levels: int, floor: float) -> Tensor:
    """Clamp to ``[floor · bound, bound]`` and, with a DAC of ``levels`` up to ``bound``, quantize, in place."""
    t.clamp_(floor * bound, bound)
    return t.mul_(levels / bound).round_().mul_(bound / levels) if levels else t


@lru_cache(maxsize=1024)
def _folded(b: float, scale: float, gain: float) -> tuple[float, ...] | None:
    """Coefficients of ``gain · sinh(scale · t)``, ``|scale · t| <= b``, as an odd polynomial in t; None at extreme
    input ranges, where float32 could not hold them. Logarithms: the powers may leave float64's range."""
    coefficients = sinh_coefficients(b)
    sizes = (math.log10(gain * c) + (2 * k + 1) * math.log10(scale) for k, c in enumerate(coefficients))
    if not all(abs(size) < 30 for size in sizes):
        return None
    return tuple(gain * c * scale ** (2 * k + 1) for k, c in enumerate(coefficients))


def _sinh_polynomial(
    x: Tensor, span: float, b: float, levels: int, gain: float, floor: float, offset: Tensor | None
) -> Tensor | None:
    """``gain · sinh(b clamp((x - offset) / span, floor, 1))`` to float32 precision, by an odd polynomial in x, or in
    steps of the DAC; None where neither a fused kernel nor work in pieces is for this x."""
    bound = float(levels or span)
    folded = _folded(b, b / bound, gain)
    if folded is not None and fused.ready(x):
        return fused.sinh(x, offset, levels / span if levels else 1.0, floor * bound, bound, levels, folded)
    if not chunkable(x):
        return None
    s = torch.empty_like(x)
    work: list[Tensor] = []
    for t in _clamped(x, s, offset, levels / span, floor * bound, bound):
        work = scratch(2, t, work)
        if levels:
            t.round_()
        if folded is not None:
            odd_polynomial_(folded, t, *work)
        else:  # passes of their own keep the precision
            odd_polynomial_(sinh_coefficients(b), t.mul_(b / bound), *work).mul_(gain)
    return s


def _clamped(x: Tensor, s: Tensor, offset: Tensor | None, steps: float, low: float, high: float) -> Iterator[Tensor]:
    """Pieces of s that hold ``x - offset``, times ``steps`` unless that is 0, clamped."""
    if offset is None:
        for x_part, t in pieces(x, s):
            yield torch.clamp(torch.mul(x_part, steps, out=t) if steps else x_part, low, high, out=t)
        return
    rows, out = x.view(-1, len(offset)), s.view(-1, len(offset))
    shift = offset * -steps
    for part in row_slices(rows):
        t = out[part]
        torch.add(shift, rows[part], alpha=steps, out=t) if steps else torch.sub(rows[part], offset, out=t)
        yield t.clamp_(low, high)


def _sinh_backward_chunked(
    grad: Tensor, s: Tensor, result: Tensor, limits: Limits, scale: float, gain: float
) -> Tensor:
    """``grad · scale · sqrt(gain² + s²)`` where ``s`` lies between the limits, else 0, into ``result``, which may be
    ``grad``."""
    square = _slope_squared(scale, gain)
    work: list[Tensor] = []
    for g, s_part, out in pieces(grad, s, result):
        (cosh,) = work = scratch(1, s_part, work)
        _sinh_backward(g, s_part, limits, scale, gain, square, out, cosh)
    return result


def _slope_squared(scale: float, gain: float) -> Tensor | None:
    """``(scale · gain)²``; None at extreme input ranges, where the squares leave float32's range."""
    if 1e-15 < scale < 1e15 and 1e-15 < gain < 1e15:
        return constants(((scale * gain) ** 2,), torch.float32)[0]
    return None


def _sinh_backward(
    g: Tensor,
    s: Tensor,
    limits: Limits,
    scale: float,
    gain: float,
    square: Tensor | None,
    out: Tensor,
    cosh: Tensor,
) -> None:
    if square is not None:
        torch.addcmul(square, s, s, value=scale**2, out=cosh).sqrt_()  # scale · gain · cosh
    else:
        torch.div(s, gain, out=cosh).square_().add_(1).sqrt_().mul_(scale * gain)
    torch.ops.aten.hardtanh_backward.grad_input(g, s, *limits, grad_input=out)
    out.mul_(cosh)


def _pulled_backward_chunked(
    grad: Tensor,
    s: Tensor,
    result: Tensor,
    limits: Limits,
    scale: float,
    gain: float,
    amount: Tensor,
    keep: Tensor | None,
) -> Tensor:
    """The same with ``grad + amount · keep · s`` for ``grad``."""
    shape = (-1, *amount.shape)
    grad_rows, s_rows, out_rows = grad.view(shape), s.view(shape), result.view(shape)
    square = _slope_squared(scale, gain)
    work: list[Tensor] = []
    for part in row_slices(s_rows):
        s_part, out = s_rows[part], out_rows[part]
        pulled, cosh = work = scratch(2, s_part, work)
        kept = s_part if keep is None else torch.mul(s_part, keep[part].view(-1, *[1] * amount.dim()), out=pulled)
        torch.addcmul(grad_rows[part], kept, amount, out=pulled)
        _sinh_backward(pulled, s_part, limits, scale, gain, square, out, cosh)
    return result


def _pulled(grad: Tensor, s: Tensor, amount: Tensor, keep: Tensor | None) -> Tensor:
    rows = s.reshape(-1, *amount.shape)
    added = rows * amount.to(s.dtype)
    if keep is not None:
        added = added * keep.view(-1, *[1] * amount.dim()).to(s.dtype)
    return grad + added.view(s.shape)


def _currents(
    x: Tensor, input_range: Tensor | float, offset: Tensor | None, b: float, levels: int, gain: float, floor: float
) -> Tensor:
    """What :class:`ShrunkSinh` computes."""
    linear = b < LINEAR_B
    readable = isinstance(input_range, float) or chunkable(x)  # elsewhere, to read a learned one is to wait
    if readable and not linear and b <= POLYNOMIAL_B and (offset is None or x.is_contiguous()):
        s = _sinh_polynomial(x.detach(), float(input_range), b, levels, gain, floor, offset)
        if s is not None:
            return s
    bound = 1.0 if linear else b
    x = x if offset is None else x - offset
    s = _drive_(x * (bound / input_range), bound, levels, floor)
    s = s if linear else s.sinh_()
    return s if gain == 1.0 else s.mul_(gain)


class ShrunkSinh(Function):
    """``s = gain · sinh(b clamp(x / input_range, floor, 1))``, the array's voltage-to-current curve (DESIGN §2).

    Saves only ``s``, which the following matrix product saves anyway: ``ds/dx = b/input_range · sqrt(gain² + s²)``
    inside the range and 0 outside. For ``b < 1e-4``, where the curve is straight, ``sinh(b u)`` is taken as ``u``.

    Args:
        x: inputs, any shape.
        input_range: a positive float, or a tensor with one element, which then gets a gradient.
        b: dimensionless, see :mod:`hf_reram.device.iv`.
        levels: DAC levels up to 1, 0 for no quantization; its gradient is straight through.
        gain: a positive float. pull: what powers of s add to its gradient, see :mod:`.power`.
        floor: lowest u, from -1 to 0, on the DAC's grid; above -1 where inputs are one-sided.
        offset: subtracted from x first, without a gradient, along its last dimension; None is 0.
        in_place: on CPU and in fused kernels, write the gradient of x over that of s, which nothing else may refer to,
            as is so where s goes into matrix products only: a tensor of its own costs more in page faults than the
            pass over it.
        keep_input: save x and compute s anew in the backward, where nothing else saves s: the weight is frozen, and
            x is what an adapter beside it saves.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        input_range: Tensor | float,
        b: float,
        levels: int,
        gain: float = 1.0,
        pull: Pull | None = None,
        floor: float = -1.0,
        offset: Tensor | None = None,
        in_place: bool = False,
        keep_input: bool = False,
    ) -> Tensor:
        linear = b < LINEAR_B
        s = _currents(x, input_range, offset, b, levels, gain, floor)
        # A little inside the largest value that the clamp lets through, so that clamped inputs get no gradient.
        inside = gain * (1 - 8 * torch.finfo(s.dtype).eps)
        low, high = (floor, 1.0) if linear else (math.sinh(b * floor), math.sinh(b))
        # Zeros get their gradient although they may be the floor: they mostly are inputs below half a DAC step.
        ctx.limits = (inside * low if floor else -1e-30, inside * high)
        ctx.linear, ctx.bound, ctx.gain, ctx.pull, ctx.in_place = linear, 1.0 if linear else b, gain, pull, in_place
        ctx.anew = (b, levels, gain, floor) if keep_input else None
        ctx.input_range = None if isinstance(input_range, Tensor) else input_range
        range_tensor = input_range if isinstance(input_range, Tensor) else None
        ctx.save_for_backward(x if keep_input else s, range_tensor, offset if keep_input else None)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        s, range_tensor, offset = ctx.saved_tensors
        input_range = ctx.input_range if range_tensor is None else range_tensor
        if ctx.anew is not None:
            s = _currents(s, input_range, offset, *ctx.anew)
        scale = ctx.bound / input_range
        pulled = None if ctx.pull is None else ctx.pull.take()
        rest = (None,) * 8
        readable = range_tensor is None or chunkable(s, grad)
        if readable and not ctx.needs_input_grad[1] and not ctx.linear:
            arguments: Any = (ctx.limits, float(scale), ctx.gain, *(pulled or ()))
            backward: Any
            if fused.ready(s, grad) and (pulled is None or s.is_contiguous()):
                backward = fused.sinh_backward_ if pulled is None else fused.pulled_backward_
                return backward(grad if ctx.in_place else grad.clone(), s, *arguments), None, *rest
            if chunkable(s, grad) and (pulled is None or s.is_contiguous() or pulled[0].dim() == 3):
                backward = _sinh_backward_chunked if pulled is None else _pulled_backward_chunked
                return backward(grad, s, grad if ctx.in_place else torch.empty_like(s), *arguments), None, *rest
        if pulled is not None:
            grad = _pulled(grad, s, *pulled)
        inside = torch.ops.aten.hardtanh_backward(grad, s, *ctx.limits)
        if ctx.linear:
            inside.mul_(ctx.gain)
        else:
            inside.mul_(torch.hypot(s, s.new_tensor(ctx.gain)))  # gain · cosh, without squares that overflow
        grad_range = None
        if ctx.needs_input_grad[1]:
            t = s / ctx.gain if ctx.linear else torch.asinh(s / ctx.gain)
            grad_range = -((inside * t).sum() / input_range).reshape(range_tensor.shape)
        return inside.mul_(scale), grad_range, *rest


class Quantize(Function):
    """Round to multiples of ``step`` within ``±levels · step``, and add a bias; the gradient is straight through.

    Args:
        y: any shape. step: positive, broadcastable to it (0 gives 0). levels: ``2^(bits-1) - 1``.
        bias: broadcastable to y, or None.
        in_place: write into y, which must be no view, and which no other operation may need: 2 ms for a 3072 x 1536
            activation on CPU, and 8 ms with a tensor of its own, most of it page faults.
    """

    @staticmethod
    def forward(
        ctx, y: Tensor, step: Tensor, levels: int, bias: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        ctx.shape = None if bias is None else bias.shape
        if in_place and fused.ready(y):
            ctx.mark_dirty(fused.quantize_(y, step, levels, bias))
            return y
        result, divisor = y if in_place else torch.empty_like(y), step.clamp(min=1e-30)
        for part, out in _parts(y, result, step):
            torch.div(part, divisor, out=out).round_().clamp_(-levels, levels)
            out.mul_(step) if bias is None else torch.addcmul(bias, out, step, out=out)
        if in_place:
            ctx.mark_dirty(y)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        learned = ctx.shape is not None and ctx.needs_input_grad[3]
        return grad, None, None, grad.sum_to_size(ctx.shape) if learned else None, None


def _parts(y: Tensor, result: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens or images of two outputs in step, against which ``like`` broadcasts, in pieces where that helps."""
    if chunkable(y, result):
        if like.dim() == 1 and y.is_contiguous():
            y, result = (t.view(-1, t.shape[-1]) for t in (y, result))
        if y.dim() > like.dim():
            for rows in row_slices(y):
                yield y[rows], result[rows]
            return
    yield y, result
