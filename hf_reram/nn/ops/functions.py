"""The operations as layers call them: autograd functions around their definitions (:mod:`.reference`), which save as
little as their gradients need, and run in pieces on a CPU (:mod:`.cpu`) or in fused kernels (:mod:`.fused`)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import cpu, fused, reference


def _twin(*tensors: Tensor) -> Any:
    """The module that computes on these: in pieces where it takes them, else as the definition stands."""
    return cpu if cpu.takes(*tensors) else reference


class ShrunkSinh(Function):
    """``s = gain · sinh(b clamp((x - offset) / span, floor, 1))``, the array's voltage-to-current curve.

    Saves only ``s``, which the following matrix product saves anyway: ``ds/dx = b / span · sqrt(gain² + s²)`` inside
    the range and 0 outside. For ``b < 1e-4``, where the curve is straight, it is ``gain · u``.

    Args:
        x: inputs, any shape.
        span: the input range, a positive float, or a tensor with one element, which then gets a gradient; s is
            multiplied by it.
        b: dimensionless, see :mod:`hf_reram.device.iv`.
        levels: DAC levels up to 1, 0 for no quantization; its gradient is straight through, for which is saved where x
            was not clamped: codes do not tell.
        gain: a positive float.
        floor: lowest u, from -1 to 0, on the DAC's grid; above -1 where inputs are one-sided.
        offset: subtracted from x first, without a gradient, along its last dimension; None is 0.
        in_place: on a CPU and in fused kernels, write the gradient of x over that of s, which nothing else may refer
            to, as is so where s goes into matrix products only.
        keep_input: save x and compute s anew in the backward, where nothing else saves s: the weight is frozen, and
            x is what an adapter beside it saves.
        channel_dim: of s, counted from the end, to compute ``Σ_n k_n s_n²`` too, over all examples n (tokens, images),
            of the shape of an example and at least in float32; None to leave it. Its gradient, a multiple of s, takes
            part in the pass over s that is made anyway.
        keep: k, (examples,) of 0 and 1, or None for all examples.

    Returns:
        s, and with ``channel_dim`` the power.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        span: Tensor | float,
        b: float,
        levels: int,
        gain: float = 1.0,
        floor: float = -1.0,
        offset: Tensor | None = None,
        in_place: bool = False,
        keep_input: bool = False,
        channel_dim: int | None = None,
        keep: Tensor | None = None,
    ) -> Any:
        s = _current(x, offset, span, b, gain, levels, floor)
        ctx.curve, ctx.in_place, ctx.keep_input = (b, gain, levels, floor), in_place, keep_input
        ctx.span = None if isinstance(span, Tensor) else span
        learned = span if isinstance(span, Tensor) else None
        rounded = reference.rounds(levels) and not keep_input and ctx.needs_input_grad[0]
        within = reference.within(x.detach(), offset, span, levels, floor) if rounded else None
        ctx.save_for_backward(x if keep_input else s, learned, offset if keep_input else None, keep, within)
        if channel_dim is None:
            return s
        rows = s.reshape(-1, *s.shape[channel_dim:])
        return s, _twin(rows).row_power(rows, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_power: Tensor | None = None):
        s, learned, offset, keep, within = ctx.saved_tensors
        b, gain, levels, floor = ctx.curve
        span: Any = ctx.span if learned is None else learned
        if ctx.keep_input:
            within = reference.within(s, offset, span, levels, floor) if reference.rounds(levels) else None
            s = _current(s, offset, span, b, gain, levels, floor)
        rest = (None,) * 9
        if grad_power is not None:
            grad = _with_power(grad, grad_power, s, keep, ctx.in_place)
        if learned is not None:
            return *_twin(grad, s).learned_sinh_gradient(grad, s, learned, b, gain, floor, within), *rest
        low, high = -math.inf, math.inf
        if within is None:
            low, high = reference.sinh_limits(b, gain, floor, s.dtype)
        else:
            grad = grad.mul_(within) if ctx.in_place and cpu.takes(grad) else grad * within
        if b < reference.LINEAR_B:
            return reference.inside(grad, s, low, high) * (gain / span), None, *rest
        if twin := fused.twin(grad, s) or (cpu if cpu.takes(grad, s) else None):
            target = grad if ctx.in_place else grad.clone()
            return twin.shrunk_sinh_gradient_(target, s, low, high, b / span, gain), None, *rest
        return reference.shrunk_sinh_gradient(grad, s, low, high, b / span, gain), None, *rest


def _current(
    x: Tensor, offset: Tensor | None, span: Tensor | float, b: float, gain: float, levels: int, floor: float
) -> Tensor:
    x = x.detach()
    if isinstance(span, Tensor):
        if not cpu.takes(x):  # on a GPU, to read it is to wait
            return reference.shrunk_sinh(x, offset, span, b, gain, levels, floor) * span
        span = float(span)
        gain *= span
    if twin := fused.twin(x) or (cpu if cpu.takes(x) else None):
        return twin.shrunk_sinh(x, offset, span, b, gain, levels, floor)
    return reference.shrunk_sinh(x, offset, span, b, gain, levels, floor)


class RowSinh(Function):
    """``s = peak · gain · sinh(b u)``, ``u = (x - offset) / peak``, with ``peak = max |x - offset|`` of each row (token
    or image): :class:`ShrunkSinh` with an input range for each row. Nothing is clamped, but what is below ``floor``.

    Args:
        x: (rows, elements). All others as of :class:`ShrunkSinh`, with ``power``: whether ``Σ_n k_n s_n²`` is wanted.

    Returns:
        s, the peaks, (rows, 1), without a gradient, and with ``power`` the power, (elements,).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        b: float,
        levels: int,
        gain: float,
        floor: float,
        offset: Tensor | None,
        in_place: bool,
        keep_input: bool,
        power: bool,
        keep: Tensor | None,
    ) -> Any:
        x = x.detach()
        s, peak, top = _row_currents(x, offset, b, gain, levels, floor, ctx.needs_input_grad[0])
        ctx.curve, ctx.in_place, ctx.keep_input = (b, gain, levels, floor), in_place, keep_input
        ctx.save_for_backward(x if keep_input else s, peak, top, offset if keep_input else None, keep)
        ctx.mark_non_differentiable(peak)
        return (s, peak, _twin(s).row_power(s, keep)) if power else (s, peak)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Any, grad_power: Tensor | None = None):
        s, peak, top, offset, keep = ctx.saved_tensors
        b, gain, levels, floor = ctx.curve
        if ctx.keep_input:
            s = _row_currents(s, offset, b, gain, levels, floor, False)[0]
        if grad_power is not None:
            grad = _with_power(grad, grad_power, s, keep, ctx.in_place)
        rest = (None,) * 9
        if cpu.takes(grad, s):
            target = grad if ctx.in_place else grad.clone()
            return cpu.row_sinh_gradient_(target, s, peak, top, b, gain, floor), *rest
        return reference.row_sinh_gradient(grad, s, peak, top, b, gain, floor), *rest


def _row_currents(
    x: Tensor, offset: Tensor | None, b: float, gain: float, levels: int, floor: float, where: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if cpu.takes(x) and x.is_contiguous():
        return cpu.row_sinh(x, offset, b, gain, levels, floor, where)
    peak, top = reference.peaks(x, offset)
    return reference.row_sinh(x, offset, peak, b, gain, levels, floor), peak, top


class Quantize(Function):
    """Round to multiples of ``step`` within ``±levels · step``, and add a bias; the gradient is straight through, and 0
    where the ADC saturates.

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
        ctx.save_for_backward(reference.converted(y, step, levels) if ctx.needs_input_grad[0] else None)
        if in_place and (twin := fused.twin(y)):
            result = twin.quantize_(y, step, levels, bias)
        elif cpu.takes(y):
            result = cpu.quantize(y, step, levels, bias, y if in_place else torch.empty_like(y))
        else:
            return reference.quantize(y, step, levels, bias)
        if in_place:
            ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        (within,) = ctx.saved_tensors
        learned = ctx.shape is not None and ctx.needs_input_grad[3]
        of_y = None if within is None else grad * within
        return of_y, None, None, grad.sum_to_size(ctx.shape) if learned else None, None


class _Clip(Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return reference.clip(weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return reference.clip_gradient(grad, *ctx.saved_tensors), None


def clip_weight(weight: Tensor, scale: Tensor, copies: Tensor | None = None) -> Tensor:
    """``clamp(W, -w_scale, w_scale)``: the weights that the cells can hold; those beyond get no gradient. Where all are
    within, as they are after every step of training, that is ``W`` itself, which costs no pass: on CPU, where looking
    is cheap, it is looked at.

    Args:
        weight: any shape. scale: w_scale, broadcastable to it.
        copies: of the weight's rows, which hold ``copies · w_scale`` together, broadcastable to it; None: one each.
    """
    if not torch.compiler.is_compiling() and weight.is_cpu and cpu.all_within(weight.detach(), scale, copies):
        return weight
    return _Clip.apply(weight, scale if copies is None else scale * copies)


class WeightVariance(Function):
    """``s²(W) = w_scale² S(|W| / w_scale)²``, the variance of each weight.

    Args:
        weight: within its range, any shape. scale: w_scale, broadcastable to it; where it is 0 the result is 0.
        std: table of S, see :class:`hf_reram.device.moments.Curve`.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, std: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, std)
        return _twin(weight).weight_variance(weight, scale, std)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale, std = ctx.saved_tensors
        return _twin(weight).weight_variance_gradient(grad, weight, scale, std), None, None


class DriftedWeight(Function):
    """``(W + m(W) + s(W) ε, s²(W))``: weights as found after the retention time, for given variates ε, differentiable
    through shift and spread, and their variance. Where a row has k copies, their w_scale is k times as large together,
    and their spread ``1/√k`` of that.

    Args:
        weight: within its range, any shape, at least float32. scale: w_scale, broadcastable to it.
        noise: ε, of the weight's shape, which may be written over.
        std, mean: tables of S and M, see :class:`hf_reram.device.moments.Curve`; the latter None where it is 0.
        variance: whether it is wanted, else None in its place. copies: k, see :func:`clip_weight`.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        scale: Tensor,
        noise: Tensor,
        std: Tensor,
        mean: Tensor | None,
        variance: bool = False,
        copies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        learned = ctx.needs_input_grad[0]  # beside an adapter the cells are frozen
        twin = _twin(weight)
        drifted, slope, square = twin.drifted_weight(weight, scale, noise, std, mean, learned, variance, copies)
        # The slope instead of the noise: it costs the same memory.
        ctx.save_for_backward(slope, *((weight, scale, std, copies) if variance and learned else ()))
        ctx.set_materialize_grads(False)
        return drifted, square

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_variance: Tensor | None):
        slope, *of_variance = ctx.saved_tensors
        result = None if grad is None else grad * slope
        if grad_variance is not None:
            twin = _twin(slope)
            added = twin.weight_variance_gradient(grad_variance, *of_variance)
            result = added if result is None else result.add_(added)
        return result, None, None, None, None, None, None


class OutputPower(Function):
    """``y`` itself, and ``Σ_n k_n |y_n - bias|²``, the power of a layer's output without its digital bias, at least in
    float32. The power's gradient is added to y's in one pass; since the power does not depend on the bias, y must have
    been computed with ``bias.detach()``, and the bias receives y's gradient here.

    Args:
        y: (rows, ...). bias: broadcastable to a row, or None. keep: (rows,) of 0 and 1, or None for all rows.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, bias, keep)
        wide = None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
        return y.view_as(y), _twin(y).total_power(y, wide, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_power: Tensor):
        y, bias, keep = ctx.saved_tensors
        of_bias = grad.sum_to_size(bias.shape) if ctx.needs_input_grad[1] else None
        return _with_power(grad, grad_power, y, keep, False, bias), of_bias, None


def _with_power(
    grad: Tensor, amount: Tensor, y: Tensor, keep: Tensor | None, in_place: bool, bias: Tensor | None = None
) -> Tensor:
    """``grad + 2 · amount · k · (y - bias)``; ``amount`` of the shape of an example, or without dimensions."""
    shape = (-1, *amount.shape) if amount.dim() else y.shape
    rows, grads = y.reshape(shape), grad.reshape(shape)
    if not cpu.takes(rows, grads):
        return (grads + reference.power_gradient(amount, rows, bias, keep)).to(grad.dtype).view(grad.shape)
    out = grads if in_place else torch.empty_like(grads)
    return cpu.add_power_gradient(grads, amount, rows, bias, keep, out).view(grad.shape)


class OffsetOutput(Function):
    """``(V, V o)``: weights as they are held, and what they make of their layer's input offset, (output channels,).

    The gradient of the second, an outer product of the weight's size, is added to that of the first in place: V goes
    into a matrix product or :class:`DriftedWeight` only, whose gradients nothing else refers to.

    Args:
        held: V, as (groups, output channels of a group, crossbar rows). offset: (groups, crossbar rows), without a
            gradient.
    """

    @staticmethod
    def forward(ctx, held: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(offset)
        ctx.set_materialize_grads(False)
        return held.view_as(held), torch.bmm(held, offset[:, :, None]).flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_output: Tensor | None):
        (offset,) = ctx.saved_tensors
        if grad_output is None:
            return grad, None
        of_output = grad_output.view(len(offset), -1, 1)
        if grad is None:
            return of_output * offset[:, None], None
        factors = of_output, offset[:, None]
        return torch.addcmul(grad, *factors) if torch.compiler.is_compiling() else grad.addcmul_(*factors), None
