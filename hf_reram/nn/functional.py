"""The autograd functions of a crossbar layer; each counts its passes over memory, which are its cost."""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..device.iv import LINEAR_B, sinh_coefficients
from ..device.retention import horner


def _sinh_(t: Tensor, b: float) -> Tensor:
    """``sinh(t)`` for ``|t| <= b``, in place. On CPU torch's float32 sinh is scalar code, 20 times slower than this."""
    if t.device.type != "cpu" or t.dtype != torch.float32 or b > 4 or torch.compiler.is_compiling():
        return t.sinh_()
    coefficients = sinh_coefficients(b)
    q = t * t
    p = q * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        p.add_(c).mul_(q)
    return t.mul_(p.add_(coefficients[0]))


class ShrunkSinh(Function):
    """``s = sinh(b clamp(x / input_range, -1, 1))``, the voltage-to-current curve of the array (DESIGN §2).

    Saves only ``s``, which the following matrix product saves anyway: ``ds/dx = b/input_range · sqrt(1 + s²)`` inside
    the range and 0 outside. For ``b < 1e-4``, where the curve is straight, ``s = clamp(x / input_range, -1, 1)``.

    Args:
        x: inputs, any shape.
        input_range: a positive float, or a tensor with one element, which then gets a gradient.
        b: dimensionless, see :mod:`hf_reram.device.iv`.
        levels: DAC levels per sign (``2^(bits-1) - 1``), 0 for no quantization; its gradient is straight through.
    """

    @staticmethod
    def forward(ctx, x: Tensor, input_range: Tensor | float, b: float, levels: int) -> Tensor:
        linear = b < LINEAR_B
        bound = 1.0 if linear else b
        t = x * (bound / input_range)
        t.clamp_(-bound, bound)
        if levels:
            t.mul_(levels / bound).round_().mul_(bound / levels)
        s = t if linear else _sinh_(t, b)
        # A little inside the largest value that the clamp lets through, so that clamped inputs get no gradient.
        ctx.limit = (1.0 if linear else math.sinh(b)) * (1 - 8 * torch.finfo(s.dtype).eps)
        ctx.linear, ctx.bound = linear, bound
        ctx.input_range = None if isinstance(input_range, Tensor) else input_range
        ctx.save_for_backward(s, input_range if isinstance(input_range, Tensor) else None)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        s, range_tensor = ctx.saved_tensors
        input_range = ctx.input_range if range_tensor is None else range_tensor
        inside = torch.ops.aten.hardtanh_backward(grad, s, -ctx.limit, ctx.limit)
        if not ctx.linear:
            inside.mul_((s * s).add_(1.0).sqrt_())  # cosh = sqrt(1 + sinh²)
        grad_range = None
        if ctx.needs_input_grad[1]:
            t = s if ctx.linear else torch.asinh(s)
            grad_range = -((inside * t).sum() / input_range).reshape(range_tensor.shape)
        return inside.mul_(ctx.bound / input_range), grad_range, None, None


class MapWeight(Function):
    """``factor · clamp(W, -w_scale, w_scale)``: the weights that the cells can hold, with a gain folded in.

    Args:
        weight: any shape. scale: w_scale, broadcastable to it. factor: float.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.factor = factor
        held = torch.maximum(torch.minimum(weight, scale), -scale)
        return held if factor == 1.0 else held.mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale = ctx.saved_tensors
        return (grad * ctx.factor).masked_fill_(weight.abs() > scale, 0.0), None, None


class WeightVariance(Function):
    """``s²(W) = w_scale² P(|W| / w_scale)``, the retention variance of each weight.

    Args:
        weight: any shape. scale: w_scale, broadcastable to it; where it is 0 the result is 0.
        variance, slope: coefficients of P and of its derivative (:class:`hf_reram.device.weight_error.WeightError`).
    """

    @staticmethod
    def _magnitude(weight: Tensor, scale: Tensor) -> Tensor:
        return (weight / scale.clamp(min=1e-30)).abs_().clamp_(max=1.0)

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, variance: tuple, slope: tuple) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.slope = slope
        return _horner(variance, WeightVariance._magnitude(weight, scale)).mul_(scale * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale = ctx.saved_tensors
        a = WeightVariance._magnitude(weight, scale)
        slope = _horner(ctx.slope, a).mul_(scale).mul_(grad).mul_(weight.sign())
        return slope.masked_fill_(weight.abs() > scale, 0.0), None, None, None


def _horner(coefficients: tuple, a: Tensor) -> Tensor:
    if len(coefficients) == 1:
        return torch.full_like(a, coefficients[0])
    p = a * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        p.add_(c).mul_(a)
    return p.add_(coefficients[0])


def weight_mean(weight: Tensor, scale: Tensor, mean: tuple) -> Tensor:
    """``m(W) = w_scale · M(|W| / w_scale) · sign(W)``, the retention shift of each weight; arguments as above."""
    a = (weight / scale.clamp(min=1e-30)).abs().clamp(max=1.0)
    return horner(mean, a) * scale * weight.sign()


class InputPower(Function):
    """``sum_n k_n s_n²``, for each column of ``s``.

    Args:
        s: (rows, columns). keep: (rows,) of 0 and 1 in the dtype of ``s``, or None for all rows.
    """

    @staticmethod
    def forward(ctx, s: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(s, keep)
        square = s * s
        return square.sum(0) if keep is None else keep @ square

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        s, keep = ctx.saved_tensors
        result = s * (2 * grad)
        return (result if keep is None else result.mul_(keep[:, None])), None


class OutputPower(Function):
    """``sum_n k_n |y_n - bias|²``: the power of a layer's output without its digital bias.

    Saves ``y``, which its consumer saves as a rule anyway, instead of a second tensor without the bias.

    Args:
        y: (rows, columns, inner). bias: (columns,) or None. keep: (rows,) of 0 and 1, or None for all rows.
    """

    @staticmethod
    def _signal(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y - bias[:, None]

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, bias, keep)
        signal = OutputPower._signal(y, bias)
        if keep is None:
            flat = signal.reshape(-1)
            return torch.dot(flat, flat)
        return torch.dot(keep, signal.square().sum((1, 2)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, bias, keep = ctx.saved_tensors
        result = OutputPower._signal(y, bias) * (2 * grad)
        if keep is not None:
            result.mul_(keep[:, None, None])
        grad_bias = -result.sum((0, 2)) if bias is not None and ctx.needs_input_grad[1] else None
        return result, grad_bias, None


class Quantize(Function):
    """Round to multiples of ``step`` within ``±levels · step``; the gradient is straight through.

    Args:
        y: any shape. step: positive, broadcastable to it (0 leaves the value). levels: ``2^(bits-1) - 1``.
    """

    @staticmethod
    def forward(ctx, y: Tensor, step: Tensor, levels: int) -> Tensor:
        return (y / step.clamp(min=1e-30)).round_().clamp_(-levels, levels).mul_(step)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None
