"""The autograd functions of a crossbar layer. Their cost is their passes over memory (see :mod:`.chunks`)."""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..device.iv import LINEAR_B, sinh_coefficients
from ..device.retention import horner
from .chunks import chunkable, pieces, row_pieces

# Up to this b a polynomial replaces sinh on CPU, where torch's float32 sinh is scalar code, 20 times slower.
_POLYNOMIAL_B = 4.0


def _drive_(t: Tensor, bound: float, levels: int) -> Tensor:
    """Clamp to ``±bound`` and, with a DAC of ``levels`` per sign, quantize, in place."""
    t.clamp_(-bound, bound)
    return t.mul_(levels / bound).round_().mul_(bound / levels) if levels else t


def _sinh_chunked(x: Tensor, scale: float | Tensor, b: float, levels: int) -> Tensor:
    """``sinh(clamp(scale x, -b, b))`` to float32 precision, by an odd polynomial."""
    coefficients = sinh_coefficients(b)
    s = torch.empty_like(x)
    for x_part, t, q, p in pieces(x, s, scratch=2):
        _drive_(torch.mul(x_part, scale, out=t), b, levels)
        torch.mul(t, t, out=q)
        torch.mul(q, coefficients[-1], out=p)
        for c in reversed(coefficients[1:-1]):
            p.add_(c).mul_(q)
        t.mul_(p.add_(coefficients[0]))
    return s


def _sinh_backward_chunked(grad: Tensor, s: Tensor, limit: float, scale: float | Tensor) -> Tensor:
    """``grad · scale · sqrt(1 + s²)`` where ``|s| < limit``, else 0."""
    result = torch.empty_like(s)
    for g, s_part, out, cosh in pieces(grad, s, result):
        torch.mul(s_part, s_part, out=cosh)
        cosh.add_(1.0).sqrt_().mul_(scale)
        torch.ops.aten.hardtanh_backward.grad_input(g, s_part, -limit, limit, grad_input=out)
        out.mul_(cosh)
    return result


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
        scale = bound / input_range
        if linear:
            s = _drive_(x * scale, bound, levels)
        elif b <= _POLYNOMIAL_B and chunkable(x):
            s = _sinh_chunked(x.detach(), scale, b, levels)
        else:
            s = _drive_(x * scale, bound, levels).sinh_()
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
        scale = ctx.bound / input_range
        if not ctx.needs_input_grad[1] and not ctx.linear and chunkable(s, grad):
            return _sinh_backward_chunked(grad, s, ctx.limit, scale), None, None, None
        inside = torch.ops.aten.hardtanh_backward(grad, s, -ctx.limit, ctx.limit)
        if not ctx.linear:
            inside.mul_((s * s).add_(1.0).sqrt_())  # cosh = sqrt(1 + sinh²)
        grad_range = None
        if ctx.needs_input_grad[1]:
            t = s if ctx.linear else torch.asinh(s)
            grad_range = -((inside * t).sum() / input_range).reshape(range_tensor.shape)
        return inside.mul_(scale), grad_range, None, None


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
    def forward(ctx, weight: Tensor, scale: Tensor, variance: tuple, slope: tuple) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.slope = slope
        result = torch.empty_like(weight)
        for w, k, out, a in _weight_pieces(weight, scale, result):
            _magnitude(w, k, a)
            _horner(variance, a, out).mul_(k * k)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale = ctx.saved_tensors
        result = torch.empty_like(weight)
        for w, k, out, g, a in _weight_pieces(weight, scale, result, grad):
            # A clipped weight has no gradient: its magnitude is above 1 here, and that of a held one at most 1.
            inside = _magnitude(w, k, a, clip=False) <= 1.0
            _horner(ctx.slope, a.clamp_(max=1.0), out).mul_(k).mul_(g).mul_(w.sign()).mul_(inside)
        return result, None, None, None


def _weight_pieces(weight: Tensor, scale: Tensor, *others: Tensor):
    """Row slices of a weight, its scale, further tensors of the weight's shape, and a work tensor."""
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        yield (weight, scale, *others, torch.empty_like(weight))
        return
    for part, work in row_pieces(weight):
        yield (weight[part], scale[part] if len(scale) == len(weight) else scale, *(t[part] for t in others), work)


def _magnitude(weight: Tensor, scale: Tensor, out: Tensor, clip: bool = True) -> Tensor:
    torch.div(weight, scale.clamp(min=1e-30), out=out).abs_()
    return out.clamp_(max=1.0) if clip else out


def _horner(coefficients: tuple, a: Tensor, out: Tensor) -> Tensor:
    if len(coefficients) == 1:
        return out.fill_(coefficients[0])
    torch.mul(a, coefficients[-1], out=out)
    for c in reversed(coefficients[1:-1]):
        out.add_(c).mul_(a)
    return out.add_(coefficients[0])


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
        if torch.compiler.is_compiling() or s.device.type != "cpu":
            square = s * s
            return square.sum(0) if keep is None else keep @ square
        total = torch.zeros(s.shape[1], dtype=s.dtype)
        for part, square in row_pieces(s):
            torch.mul(s[part], s[part], out=square)
            total += square.sum(0) if keep is None else keep[part] @ square
        return total

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
        y: (rows, columns) or (rows, columns, inner). bias: (columns,) or None.
        keep: (rows,) of 0 and 1, or None for all rows.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, bias, keep)
        if torch.compiler.is_compiling() or y.device.type != "cpu":
            square = (y if bias is None else y - _like(bias, y)).square()
            return square.sum() if keep is None else torch.dot(keep, square.flatten(1).sum(1))
        total = torch.zeros((), dtype=y.dtype)
        for part, signal in row_pieces(y):
            if bias is None:
                signal.copy_(y[part])
            else:
                torch.sub(y[part], _like(bias, y), out=signal)
            if keep is not None:
                signal.mul_(_rows_like(keep[part], y))
            row = signal.view(-1)
            total += torch.dot(row, row)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, bias, keep = ctx.saved_tensors
        result = y * (2 * grad) if bias is None else (y - _like(bias, y)).mul_(2 * grad)
        if keep is not None:
            result.mul_(_rows_like(keep, y))
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[1]:
            grad_bias = -result.sum([d for d in range(y.dim()) if d != 1])
        return result, grad_bias, None


def _like(bias: Tensor, y: Tensor) -> Tensor:
    return bias if y.dim() == 2 else bias[:, None]


def _rows_like(keep: Tensor, y: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (y.dim() - 1))


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
