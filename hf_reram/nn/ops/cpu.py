"""The operations of :mod:`.reference` for float32 tensors on a CPU, in pieces that stay in its cache.

A chain of in-place passes over a large tensor is bound by memory, and every temporary of its size by page faults:
the sinh of a 3072 x 1536 activation takes 16 ms in whole passes and 3 ms in pieces of 2 MiB.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...device.iv import LINEAR_B, SERIES_B, range_slope_coefficients, sinh_coefficients
from . import reference
from .reference import POLYNOMIAL_B

ELEMENTS = 1 << 19  # of a piece
PIECE = 1 << 17  # of a weight, beside which much else has to lie in the cache


def takes(*tensors: Tensor) -> bool:
    """Whether all are plain float32 CPU tensors in the same dense layout, in eager mode."""
    return alike(*tensors) and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def alike(*tensors: Tensor) -> bool:
    """Whether all are plain tensors in the same dense layout, in eager mode."""
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    if any(type(t) is not Tensor or t.shape != shape or t.stride() != stride for t in tensors):
        return False
    return first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))


# Pieces


def flat(t: Tensor) -> Tensor:
    """All elements of a dense tensor in memory order, without a copy."""
    return t.as_strided((t.numel(),), (1,))


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of equally laid out tensors, in step."""
    flats = [flat(t) for t in tensors]
    for start in range(0, flats[0].numel(), ELEMENTS):
        yield tuple(f[start : start + ELEMENTS] for f in flats)


def row_slices(t: Tensor, elements: int | None = None) -> list[slice]:
    """Slices of the first dimension of about a piece's size, or of so many elements."""
    rows = t.shape[0]
    step = max(1, (elements or ELEMENTS) // max(t.numel() // max(rows, 1), 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _work(t: Tensor, slices: list[slice]) -> Tensor:
    """A tensor for one slice of t at a time."""
    return torch.empty(slices[0].stop if slices else 0, *t.shape[1:], dtype=t.dtype, device=t.device)


def _scratch(count: int, t: Tensor, last: list[Tensor]) -> list[Tensor]:
    """Work tensors for a piece: new ones for the first, for later, not larger ones the same memory."""
    if not last:
        return [torch.empty_like(t) for _ in range(count)]
    return last if last[0].shape == t.shape else [w.view(-1)[: t.numel()].view(t.shape) for w in last]


@lru_cache(maxsize=1024)
def _constants(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # training may follow
        return tuple(torch.tensor(c, dtype=torch.float32, device="cpu") for c in numbers)


def _polynomial(coefficients: tuple[float, ...], a: Tensor, out: Tensor) -> Tensor:
    """``Σ coefficients[k] a^k`` into ``out`` by Horner's scheme, one pass a degree."""
    if len(coefficients) == 1:
        return out.fill_(coefficients[0])
    numbers = _constants(coefficients)
    torch.add(numbers[-2], a, alpha=coefficients[-1], out=out)
    for c in numbers[-3::-1]:
        torch.addcmul(c, out, a, out=out)
    return out


def _odd_polynomial_(coefficients: tuple[float, ...], t: Tensor, square: Tensor, value: Tensor) -> Tensor:
    """``t Σ coefficients[k] t^(2k)`` in place, with two work tensors of its shape."""
    if len(coefficients) == 2:  # a pass less
        (first,), second = _constants(coefficients[:1]), coefficients[1]
        return t.mul_(torch.addcmul(first, t, t, value=second, out=value))
    torch.mul(t, t, out=square)
    return t.mul_(_polynomial(coefficients, square, value))


# The I-V curve and the DAC


def shrunk_sinh(
    x: Tensor, offset: Tensor | None, span: float, b: float, gain: float, levels: int, floor: float
) -> Tensor:
    """:func:`.reference.shrunk_sinh` for a range that is a float."""
    if b < LINEAR_B or b > POLYNOMIAL_B or (offset is not None and not x.is_contiguous()):
        return reference.shrunk_sinh(x, offset, span, b, gain, levels, floor)
    bound = float(levels or span)
    folded = reference.folded(b, b / bound, gain)
    s = torch.empty_like(x)
    work: list[Tensor] = []
    for t in _clamped(x, s, offset, levels / span, floor * bound, bound):
        work = _scratch(2, t, work)
        if levels:
            t.round_()
        if folded is not None:
            _odd_polynomial_(folded, t, *work)
        else:  # passes of their own keep the precision
            _odd_polynomial_(sinh_coefficients(b), t.mul_(b / bound), *work).mul_(gain)
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


def shrunk_sinh_gradient_(grad: Tensor, s: Tensor, low: float, high: float, scale: float, gain: float) -> Tensor:
    """:func:`.reference.shrunk_sinh_gradient` into ``grad``: a tensor of its own costs more in page faults than the
    pass over it."""
    square = None
    if 1e-15 < scale < 1e15 and 1e-15 < gain < 1e15:  # else the squares leave float32's range
        (square,) = _constants(((scale * gain) ** 2,))
    work: list[Tensor] = []
    for g, s_part in pieces(grad, s):
        (slope,) = work = _scratch(1, s_part, work)
        if square is not None:
            torch.addcmul(square, s_part, s_part, value=scale**2, out=slope).sqrt_()
        else:
            torch.div(s_part, gain, out=slope).square_().add_(1).sqrt_().mul_(scale * gain)
        torch.ops.aten.hardtanh_backward.grad_input(g, s_part, low, high, grad_input=g)
        g.mul_(slope)
    return grad


def learned_sinh_gradient(
    grad: Tensor, s: Tensor, span: Tensor, b: float, gain: float, floor: float, within: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.learned_sinh_gradient`."""
    if within is not None and not alike(grad, within):
        return reference.learned_sinh_gradient(grad, s, span, b, gain, floor, within)
    result, of_span = torch.empty_like(grad), torch.zeros_like(span)
    for g, s_part, out, *free in pieces(grad, s, result, *(() if within is None else (within,))):
        part, more = reference.learned_sinh_gradient(g, s_part, span, b, gain, floor, *free or (None,))
        out.copy_(part)
        of_span += more
    return result, of_span


# The same, each row in units of its own largest magnitude


def row_sinh(
    x: Tensor, offset: Tensor | None, b: float, gain: float, levels: int, floor: float, where: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`.reference.row_sinh`, with :func:`.reference.peaks`; ``where``: also tell where the peaks are."""
    folded = reference.folded(b, b / (levels or 1), gain) if LINEAR_B <= b <= POLYNOMIAL_B else None
    if folded is None:
        unit, index = reference.peaks(x, offset)
        return reference.row_sinh(x, offset, unit, b, gain, levels, floor), unit, index
    s, peak = torch.empty_like(x), x.new_empty(len(x), 1)
    top = x.new_empty(len(x), 1, dtype=torch.long) if where else None
    bound = float(levels or 1)
    work: list[Tensor] = []
    for part in row_slices(x):
        t, unit = s[part], peak[part]
        work = _scratch(2, t, work)
        t.copy_(x[part]) if offset is None else torch.sub(x[part], offset, out=t)
        size = torch.abs(t, out=work[0])
        torch.max(size, 1, keepdim=True, out=(unit, top[part])) if where else torch.amax(size, 1, True, out=unit)  # type: ignore[index]
        unit.clamp_(min=1e-30)
        t.mul_(bound / unit)
        if floor > -1 or levels:
            t.clamp_(floor * bound, bound)
        if levels:
            t.round_()
        _odd_polynomial_(folded, t, *work).mul_(unit)
    return s, peak, top


def row_sinh_gradient_(
    grad: Tensor, s: Tensor, peak: Tensor, top: Tensor, b: float, gain: float, floor: float
) -> Tensor:
    """:func:`.reference.row_sinh_gradient` into ``grad``."""
    if not LINEAR_B <= b <= SERIES_B or floor > -1:
        return grad.copy_(reference.row_sinh_gradient(grad, s, peak, top, b, gain, floor))
    coefficients = tuple(gain * c for c in range_slope_coefficients(b))
    (one,), scale = _constants(((gain * b) ** 2,)), (gain * b) ** 2
    work: list[Tensor] = []
    for part in row_slices(s):
        g, s_part = grad[part], s[part]
        t, square, value = work = _scratch(3, s_part, work)
        torch.mul(s_part, 1 / (peak[part] * gain), out=t)
        torch.mul(t, t, out=square)
        _polynomial(coefficients, square, value).mul_(square).mul_(t).mul_(g)
        of_peak = value.sum(1, keepdim=True) * s_part.gather(1, top[part]).sign()
        g.mul_(torch.addcmul(one, t, t, value=scale, out=value).sqrt_())
        g.scatter_add_(1, top[part], of_peak)
    return grad


# The ADC


def quantize(y: Tensor, step: Tensor, levels: int, bias: Tensor | None, out: Tensor) -> Tensor:
    """:func:`.reference.quantize` into ``out``, which may be y."""
    divisor = step.clamp(min=1e-30)
    for part, result in _like(y, out, step):
        torch.div(part, divisor, out=result).round_().clamp_(-levels, levels)
        result.mul_(step) if bias is None else torch.addcmul(bias, result, step, out=result)
    return out


def _like(y: Tensor, out: Tensor, step: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens or images of two outputs in step, against which ``step`` broadcasts, in pieces where that is possible."""
    if step.dim() == 1 and y.is_contiguous():
        y, out = (t.view(-1, t.shape[-1]) for t in (y, out))
    if y.dim() > step.dim():
        for rows in row_slices(y):
            yield y[rows], out[rows]
    else:
        yield y, out


# The cells


def all_within(weight: Tensor, scale: Tensor, copies: Tensor | None = None) -> bool:
    """Whether no weight is beyond w_scale, times the copies of its row: looking is cheaper than clipping, and after
    each step of training it is so."""
    if copies is not None:
        parts = row_slices(weight, PIECE)
        return all(
            bool((weight[part].abs() <= _rows(scale, weight, part) * _rows(copies, weight, part)).all())
            for part in parts
        )
    shape = (1,) * (weight.dim() - scale.dim()) + scale.shape
    dims = [d for d, size in enumerate(shape) if size == 1]
    scale = scale.view(shape)
    if not dims:
        return bool((weight.abs() <= scale).all())
    return bool((weight.amax(dims, True) <= scale).all() and (weight.amin(dims, True) >= -scale).all())


def weight_variance(weight: Tensor, scale: Tensor, std: Tensor) -> Tensor:
    """:func:`.reference.weight_variance`."""
    result = torch.empty_like(weight)
    for part, k, found in _weight_pieces(weight, scale, (std,), False):
        torch.mul(found[0].value, k, out=result[part]).square_()
    return result


def weight_variance_gradient(
    grad: Tensor, weight: Tensor, scale: Tensor, std: Tensor, copies: Tensor | None = None
) -> Tensor:
    """:func:`.reference.weight_variance_gradient`."""
    result = torch.empty_like(weight)
    for part, _, (found,) in _weight_pieces(weight, scale, (std,), True, copies):
        out = torch.mul(found.value, found.slope, out=result[part])
        out.mul_(torch.sign(weight[part], out=found.value)).mul_(2 * _rows(scale, weight, part)).mul_(grad[part])
    return result


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
    """:func:`.reference.drifted_weight`; the slope is written over the noise, as new memory costs a pass of its own."""
    drifted = torch.empty_like(weight)
    squares = torch.empty_like(weight) if variance else None
    share = None if copies is None else copies.rsqrt()
    tables = (std,) if mean is None else (std, mean)
    for part, k, (spread, *shift) in _weight_pieces(weight, scale, tables, slope, copies):
        w, n, out = weight[part], noise[part], drifted[part]
        if share is not None:
            of_rows = _rows(share, weight, part)
            n.mul_(of_rows)
        if squares is not None:
            square = torch.mul(spread.value, k, out=squares[part])
            (square if share is None else square.mul_(of_rows)).square_()
        torch.mul(n, spread.value, out=out)
        sign = torch.sign(w, out=spread.value)
        if slope:
            n.mul_(spread.slope).mul_(sign).add_(1.0)
        for found in shift:
            out.addcmul_(found.value, sign)
            if slope:
                n.add_(found.slope)
        out.mul_(k).add_(w)
    return drifted, noise if slope else None, squares


class Found(NamedTuple):
    """Of a piece of a weight, in memory that its reader may write to."""

    value: Tensor
    slope: Tensor


class Lookup:
    """:func:`.reference.looked_up` in several tables for one piece after the other, all in the same memory: new tensors
    would cost more in page faults than what is done with them.

    Args:
        shape: of the largest piece; others have fewer rows. slope: whether slopes are wanted, which else are anything.
    """

    def __init__(self, tables: tuple[Tensor, ...], shape: Sequence[int], slope: bool):
        self.tables, self.slope = tables, slope
        new = tables[0].new_empty  # whatever PyTorch's default dtype and device are
        self._a, self._behind, self._index = new(shape), new(shape), new(shape, dtype=torch.int32)
        self._found = [Found(new(shape), new(shape)) for _ in tables]

    def of_weight(self, weight: Tensor, scale: Tensor) -> list[Found]:
        """At ``min(|W| / w_scale, 1)``."""
        return self.at(torch.div(weight, scale, out=self._a[: len(weight)]).abs_().clamp_(max=1.0))

    def at(self, a: Tensor) -> list[Found]:
        """At ``a``, from 0 to 1."""
        size, before = len(a), 0
        index, behind = self._index[:size], self._behind[:size]
        found = [Found(value[:size], slope[:size]) for value, slope in self._found]
        for table, (value, step) in zip(self.tables, found):
            intervals = table.shape[1] - 1
            if not intervals:
                value.copy_(table[0]), step.zero_()
                continue
            if intervals != before:  # else at the places of the last table
                before = intervals
                index.copy_(torch.mul(a, intervals, out=behind)).clamp_(0, intervals)
                behind.frac_()
            torch.index_select(table[0], 0, index.view(-1), out=value.view(-1))
            torch.index_select(table[1], 0, index.view(-1), out=step.view(-1))
            value.addcmul_(step, behind)
            if self.slope:
                step.mul_(intervals)
        return found


def _weight_pieces(
    weight: Tensor, scale: Tensor, tables: tuple[Tensor, ...], slope: bool, copies: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, list[Found]]]:
    """Row slices of a weight, w_scale there, times the copies of its rows, and what is found in each table."""
    slices = row_slices(weight, PIECE)
    lookup = Lookup(tables, (slices[0].stop if slices else 0, *weight.shape[1:]), slope)
    together = None if copies is None else _work(weight, slices)
    for part in slices:
        k = _rows(scale, weight, part)
        if together is not None:
            out = together[: part.stop - part.start]
            k = torch.mul(k.expand(out.shape), _rows(copies, weight, part), out=out)
        yield part, k, lookup.of_weight(weight[part], k.clamp(min=1e-30))


def _rows(t: Any, weight: Tensor, part: slice) -> Tensor:
    """A slice of the rows of what broadcasts against a weight. Of fewer dimensions it lies along the last ones
    (Conv1D), even where the weight is square."""
    return t[part] if t.dim() == weight.dim() and len(t) == len(weight) else t


# Powers


def row_power(s: Tensor, keep: Tensor | None) -> Tensor:
    """:func:`.reference.row_power`."""
    power = s.new_zeros(s.shape[1:])
    slices = row_slices(s)
    work = _work(s, slices)
    for part in slices:
        square = torch.mul(s[part], s[part], out=work[: part.stop - part.start])
        power += square.sum(0) if keep is None else (keep[part].float() @ square.flatten(1)).view_as(power)
    return power


def total_power(y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """:func:`.reference.total_power`."""
    total = y.new_zeros(())
    slices = row_slices(y)
    work = _work(y, slices)
    for part in slices:
        signal = work[: part.stop - part.start]
        signal.copy_(y[part]) if bias is None else torch.sub(y[part], bias, out=signal)
        if keep is not None:
            signal.mul_(reference.rows_like(keep[part], signal))
        row = signal.view(-1)
        total += torch.dot(row, row)
    return total


def add_power_gradient(
    grad: Tensor, amount: Tensor, y: Tensor, bias: Tensor | None, keep: Tensor | None, out: Tensor
) -> Tensor:
    """``grad`` and :func:`.reference.power_gradient`, into ``out``, which may be grad."""
    slices = row_slices(y)
    work, double = _work(y, slices), 2 * amount
    for part in slices:
        signal = y[part]
        if bias is not None:
            signal = torch.sub(signal, bias, out=work[: part.stop - part.start])
        if keep is not None:
            signal = torch.mul(signal, reference.rows_like(keep[part], signal), out=work[: part.stop - part.start])
        torch.addcmul(grad[part], signal, double, out=out[part])
    return out
