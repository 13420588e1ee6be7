"""The definition of each operation that a crossbar performs element by element, and of its gradient.

These are what ``torch.compile`` traces, what :func:`hf_reram.use_fused_kernels` compiles, and what eager mode runs, but
for float32 tensors on a CPU: there :mod:`.cpu` does the same in pieces that stay in its cache, and is tested against
this file. The autograd functions around both are in :mod:`.functions`.

Numbers may be Python's or tensors without dimensions, unless said otherwise.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...device.iv import LINEAR_B, SERIES_B, range_slope_coefficients, sinh_coefficients
from ...device.relaxation import horner

# Up to this b a polynomial stands for the sinh on a CPU, where PyTorch's is scalar code, 20 times slower.
POLYNOMIAL_B = 4.0

# The I-V curve and the DAC


def shrunk_sinh(x: Tensor, offset: Tensor | None, span: Any, b: float, gain: Any, levels: Any, floor: Any) -> Tensor:
    """``gain · sinh(b u)`` with ``u = clamp((x - offset) / span, floor, 1)``, in steps of the DAC where it has levels.

    Args:
        x: the layer's input, any shape. offset: along its last dimension, or None.
        span: the input range, a number or a tensor of one element. b: float; below 1e-4 the curve is the line
            ``gain · u``.
        levels: of the DAC up to 1; 0 for an ideal one. floor: lowest u, from -1 to 0.
    """
    rounded = rounds(levels)
    bound = levels if rounded else 1
    if x.dtype == torch.float16:  # whose sinh ends at 11.8, where gains are 0 already
        return shrunk_sinh(x.float(), offset, span, b, gain, levels, floor).to(x.dtype)
    polynomial = LINEAR_B <= b <= POLYNOMIAL_B and x.device.type == "cpu" and x.dtype != torch.float64
    fixed = not isinstance(gain, Tensor)  # which compiled code cannot make coefficients of
    inner, outer = (b / bound, gain) if fixed else (b, 1.0)
    coefficients = folded(b, inner, outer) if polynomial else None
    if coefficients is not None and fixed:
        return polynomial_sinh(x, offset, bound / span, floor * bound, bound, rounded, coefficients)
    u = _clamped(x, offset, bound / span, floor * bound, bound, rounded)
    if coefficients is not None:
        u = u / bound
        return u * horner(coefficients, u * u) * gain
    if b < LINEAR_B:
        return u * (gain / bound)
    return torch.sinh(u * (b / bound)) * gain


def polynomial_sinh(
    x: Tensor, offset: Tensor | None, steps: Any, low: Any, high: Any, rounded: bool, coefficients: Any
) -> Tensor:
    """``t Σ c_k t^(2k)`` with ``t = clamp(steps · (x - offset), low, high)``, rounded where that is wanted."""
    t = _clamped(x, offset, steps, low, high, rounded)
    return t * horner(coefficients, t * t)


def rounds(levels: Any) -> bool:
    """Whether a DAC has levels; those that are a tensor are some."""
    return isinstance(levels, Tensor) or levels > 0


def _clamped(x: Tensor, offset: Tensor | None, steps: Any, low: Any, high: Any, rounded: bool) -> Tensor:
    t = torch.clamp((x if offset is None else x - offset) * steps, low, high)
    return torch.round(t) if rounded else t


def within(x: Tensor, offset: Tensor | None, span: Any, levels: Any, floor: Any) -> Tensor:
    """Where ``(x - offset) / span`` is not clamped to its limits, ``floor`` and 1, bool; the edges are within, and so
    are zeros where the floor is 0, although they may be what ReLU cut off."""
    low, high = span * floor, span * 1.0
    if offset is None:
        return (x >= low) & (x <= high)
    return (x >= offset + low) & (x <= offset + high)


def shrunk_sinh_gradient(grad: Tensor, s: Tensor, low: Any, high: Any, scale: Any, gain: Any) -> Tensor:
    """``grad · scale · sqrt(gain² + s²)`` where ``low < s < high``, else 0: with ``scale = b / span`` the gradient of
    :func:`shrunk_sinh` with respect to x, from its result alone."""
    wide = s.float() if s.dtype == torch.float16 else s  # in which gain and scale may be 0 or infinite
    gain = gain if isinstance(gain, Tensor) else wide.new_full((), gain)
    slope = torch.hypot(wide, gain) * scale  # gain · cosh, without squares that overflow
    return (inside(grad, s, low, high) * slope).to(grad.dtype)


def inside(grad: Tensor, t: Tensor, low: Any, high: Any) -> Tensor:
    """``grad`` where ``low < t < high``, else 0."""
    if isinstance(low, Tensor):
        return torch.where((t > low) & (t < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, t, low, high)


# The same, times the input range


def learned_sinh_gradient(
    grad: Tensor, s: Tensor, span: Tensor, b: float, gain: Any, floor: Any, within: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``span · gain · sinh(b u)`` with respect to x and to span, a tensor of one element, from the
    result alone; ``within``: where x was not clamped, None where s tells."""
    t = s.to(torch.promote_types(s.dtype, torch.float32)) / (span * gain)
    wide, (slope, change) = grad.to(t.dtype), _slopes(t, b, gain)
    if within is None:
        low, high = sinh_limits(b, 1.0, floor, s.dtype)
        within = (t > low) & (t < high)
    of_span = (wide * torch.where(within, change, t * gain)).sum()
    return torch.where(within, wide * slope, 0.0).to(grad.dtype), of_span.reshape(span.shape).to(span.dtype)


def _slopes(t: Tensor, b: float, gain: Any) -> tuple[Tensor, Tensor]:
    """Of ``r · gain · sinh(b x / r)``, ``t = sinh(b x / r)``, or ``t = x / r`` where the curve is a line: its slope in
    x, and that in r."""
    if b < LINEAR_B:
        slope = torch.ones_like(t) * gain if isinstance(gain, Tensor) else torch.full_like(t, gain)
        return slope, torch.zeros_like(t)
    return torch.hypot(t, torch.ones_like(t)) * (gain * b), range_slope(t, b) * gain


# The same, each row in units of its own largest magnitude


def peaks(x: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """``max |x - offset|`` of each row, (rows, 1), and where it is; at least 1e-30, so that one can divide by it.

    Args:
        x: (rows, elements). offset: (elements,), or None.
    """
    peak, top = (x if offset is None else x - offset).abs().max(1, keepdim=True)
    return peak.clamp(min=max(1e-30, torch.finfo(x.dtype).tiny)), top


def row_sinh(x: Tensor, offset: Tensor | None, peak: Tensor, b: float, gain: Any, levels: Any, floor: Any) -> Tensor:
    """``peak · gain · sinh(b u)`` with ``u = (x - offset) / peak``, arguments as of :func:`shrunk_sinh` and
    :func:`peaks`."""
    return shrunk_sinh(x, offset, peak, b, gain, levels, floor) * peak


def row_sinh_gradient(grad: Tensor, s: Tensor, peak: Tensor, top: Tensor, b: float, gain: Any, floor: Any) -> Tensor:
    """The gradient of :func:`row_sinh` with respect to x, from its result alone. The element that is the peak gets the
    peak's gradient too: what a curve that is no line makes of the row in other units, ``Σ grad (s / peak - u ds/dx)``.
    """
    s_wide = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    wide, unit = grad.to(s_wide.dtype), peak.to(s_wide.dtype)
    t = s_wide / (unit * gain)
    slope, change = _slopes(t, b, gain)
    if isinstance(floor, Tensor) or floor > -1:
        free = t > sinh_limits(b, 1.0, floor, s.dtype)[0]
        free = free | (floor <= -1) if isinstance(floor, Tensor) else free  # where nothing is clamped
        slope, change = torch.where(free, slope, 0.0), torch.where(free, change, t * gain)
    of_peak = (wide * change).sum(1, keepdim=True) * s_wide.gather(1, top).sign()
    return (wide * slope).scatter_add(1, top, of_peak).to(grad.dtype)


def range_slope(t: Tensor, b: float) -> Tensor:
    """``t - asinh(t) sqrt(1 + t²)``, for ``|t| <= sinh(b)``."""
    if b > SERIES_B:
        return t - torch.asinh(t) * torch.hypot(t, torch.ones_like(t))
    square = t * t
    return t * square * horner(_range_slope(b), square)


def _range_slope(b: float) -> tuple[float, ...]:
    return range_slope_coefficients(b)


def sinh_limits(b: float, gain: Any, floor: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Between which values of s the input was not clamped: a little inside of what the clamp lets through."""
    edge = gain * (1 - 8 * torch.finfo(dtype).eps)
    sinh: Any = torch.sinh if isinstance(floor, Tensor) else math.sinh
    low, high = (floor, 1.0) if b < LINEAR_B else (sinh(b * floor), math.sinh(b))
    # Zeros get their gradient although they may be the floor: they mostly are inputs below half a DAC step.
    if isinstance(floor, Tensor):
        return torch.where(floor == 0, -1e-30, edge * low), edge * high
    return (edge * low if floor else -1e-30), edge * high


@lru_cache(maxsize=1024)
def _folded(b: float, scale: float, gain: float) -> tuple[float, ...] | None:
    coefficients = sinh_coefficients(b)
    # Logarithms: the powers may leave float64's range.
    sizes = (math.log10(gain * c) + (2 * k + 1) * math.log10(scale) for k, c in enumerate(coefficients))
    if not all(abs(size) < 30 for size in sizes):
        return None
    return tuple(gain * c * scale ** (2 * k + 1) for k, c in enumerate(coefficients))


def folded(b: float, scale: float, gain: float) -> tuple[float, ...] | None:
    """Coefficients of ``gain · sinh(scale · t)``, ``|scale · t| <= b``, as an odd polynomial in t; None at extreme
    input ranges, where float32 could not hold them."""
    return _folded(b, scale, gain)


# As torch.compiler.assume_constant_result says it, which would import the whole compiler.
folded._dynamo_marked_constant = True  # type: ignore[attr-defined]
_range_slope._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The ADC


def converted(y: Tensor, step: Tensor, levels: int) -> Tensor:
    """Where an ADC does not saturate, bool: what rounds to a code of its own."""
    top = step * (levels + 0.5)
    return (y <= top) & (y >= -top)


def quantize(y: Tensor, step: Tensor, levels: Any, bias: Tensor | None) -> Tensor:
    """``step · clamp(round(y / step), ±levels)``, plus a bias; 0 where the step is.

    Args:
        y: any shape. step, bias: broadcastable to it. levels: per sign.
    """
    code = torch.clamp(torch.round(y / step.clamp(min=1e-30)), -levels, levels)
    result = code * step if bias is None else bias + code * step
    return result if result.dtype == y.dtype else result.to(y.dtype)  # without need it costs torch 2.11 the gradient


# The cells


def clip(weight: Tensor, scale: Tensor) -> Tensor:
    """``clamp(W, ±w_scale)``: the weights that the cells can hold."""
    return torch.clamp(weight, -scale, scale)


def clip_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """0 where |W| is beyond w_scale; a weight at its very edge keeps its gradient, so that it can come back."""
    edge = 1.0 + 4 * torch.finfo(weight.dtype).eps
    return torch.where(weight.abs() <= scale * edge, grad, 0.0)


def looked_up(table: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """A curve's value at ``a``, and its slope there.

    Args:
        table: of a :class:`hf_reram.device.moments.Curve`, (2, points). a: any shape, from 0 to 1.
    """
    intervals = table.shape[1] - 1
    values, steps = table.unbind()
    if not intervals:
        return values.expand(a.shape), steps.expand(a.shape)
    place = a * intervals
    index = place.detach().int().clamp(0, intervals)  # NaN as well, which is to stay NaN
    value, step = (row.index_select(0, index.flatten()).view(a.shape) for row in (values, steps))
    return value + step * (place - index), step * intervals


def weight_variance(weight: Tensor, scale: Tensor, std: Tensor) -> Tensor:
    """``s²(W) = w_scale² S(|W| / w_scale)²``, the variance of each weight within its range.

    Args:
        weight: within its range. scale: broadcastable to it. std: table of S, see :func:`looked_up`.
    """
    return (scale * looked_up(std, _magnitude(weight, scale))[0]).square()


def weight_variance_gradient(
    grad: Tensor, weight: Tensor, scale: Tensor, std: Tensor, copies: Tensor | None = None
) -> Tensor:
    """``grad · 2 w_scale S S'(|W| / w_scale) sign(W)``; of a variance of copies see :func:`drifted_weight`."""
    spread, slope = looked_up(std, _magnitude(weight, scale if copies is None else scale * copies))
    return grad * 2 * scale * weight.sign() * spread * slope


def drifted_weight(
    weight: Tensor,
    scale: Tensor,
    noise: Tensor,
    std: Tensor,
    mean: Tensor | None,
    slope: bool,
    variance: bool,
    copies: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``W + m(W) + s(W) ε``: weights as they are found after the retention time, for given variates ε; and where wanted
    its derivative with respect to W, and the variance ``s²(W)``.

    With ``a = |W| / w_scale`` the derivative is ``1 + M'(a) + sign(W) ε S'(a)``. Where k copies of a row hold its
    weights, w_scale is k times as large, and the spread ``√k w_scale S``: the copies err independently.

    Args:
        weight: within its range. scale: broadcastable to it. noise: ε, of its shape. std, mean: tables of S and M, see
            :func:`looked_up`; the latter None where it is 0. copies: k, broadcastable to the weight; None: 1.
    """
    if copies is not None:
        scale, noise = scale * copies, noise * copies.rsqrt()
    a, sign = _magnitude(weight, scale), weight.sign()
    spread, steepness = looked_up(std, a)
    error, gained = spread * noise, 1.0 + sign * noise * steepness if slope else None
    if mean is not None:
        shift, shift_slope = looked_up(mean, a)
        error = error + shift * sign
        gained = None if gained is None else gained + shift_slope
    square = (scale * spread).square() if variance else None
    return weight + scale * error, gained, square if square is None or copies is None else square / copies


def weight_mean(weight: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """``m(W) = w_scale · M(|W| / w_scale) · sign(W)``, the mean shift of each weight; arguments as above."""
    return looked_up(mean, _magnitude(weight, scale))[0] * scale * weight.sign()


def _magnitude(weight: Tensor, scale: Tensor) -> Tensor:
    # Not to 1: that would take the gradient from weights at their very edge, which those of a model in half precision
    # pass by its rounding, although they are in float32 here.
    return (weight / scale.clamp(min=1e-30)).abs().clamp(max=1.0 + torch.finfo(torch.bfloat16).eps)


# Powers


def row_power(s: Tensor, keep: Tensor | None) -> Tensor:
    """``Σ_n k_n s_n²`` for each element of a row, at least in float32.

    Args:
        s: (rows, ...). keep: (rows,) of 0 and 1, or None for all rows.
    """
    square = s.to(torch.promote_types(s.dtype, torch.float32)).square()
    return (square if keep is None else square * rows_like(keep, square)).sum(0)


def total_power(y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """``Σ_n k_n |y_n - bias|²``: the power of a layer's output without its digital bias, at least in float32."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    signal = y if bias is None else y - bias
    return (signal if keep is None else signal * rows_like(keep, signal)).square().sum()


def power_gradient(amount: Tensor, y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """``2 · amount · k · (y - bias)``, the gradient of both powers; of float16 in float32, since an amount, of which
    there is one for many elements, may lie below what float16 holds although its products do not."""
    wide = y.float() if y.dtype == torch.float16 else y
    signal = wide if bias is None else wide - bias.to(wide.dtype)
    result = signal * (2 * amount).to(wide.dtype)
    return result if keep is None else result * rows_like(keep, result)


def rows_like(keep: Tensor, like: Tensor) -> Tensor:
    """``keep`` so that it broadcasts against (rows, ...), in its dtype."""
    return keep.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
