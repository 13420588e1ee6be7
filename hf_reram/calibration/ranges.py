"""Choose what drives an array: input range, static or each token's own, its shrink, and the read-out gain."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ReRAMConfig, converter_levels, dac_grid
from ..device.iv import LINEAR_B, full_scale_gain, least_squares_gain, sinh_coefficients
from ..device.read_noise import relative_read_noise
from ..nn import CrossbarLayer
from ..nn.array import cell_weight
from ..nn.converter import conversion_errors
from ..nn.mapping import layer_scales, relative_weights
from ..nn.ops import reference
from .input_scales import TINY, typical_clip
from .statistics import LayerStatistics

# Candidates for range_shrink="auto", and for the ADC's full scale in largest sampled currents: more than 1, since they
# are only samples.
SHRINKS = tuple(0.02 * 50 ** (i / 31) for i in range(32))
FULL_SCALES = tuple(1.25 * 2 ** (-i / 6) for i in range(49))

# Share of a static range's error below which each token gets one of its own, which costs digital work.
NOTABLE = 0.9

# Elements of normalized inputs that the gain of a range of its own for each token is fitted to.
_FITTED = 1 << 16


class Curve(NamedTuple):
    """What the samples of a layer's inputs meet.

    Attributes:
        span: the input range, a float, or (samples, 1) where each token has its own.
        b: see :mod:`hf_reram.device.iv`. gain: times b.
    """

    span: Any
    b: float
    gain: float

    def phi(self, x: Tensor, levels: int = 0, floor: float = -1.0) -> Tensor:
        """What reaches the array of samples (..., samples, rows), in steps of a DAC where it has levels."""
        gain = self.gain if self.b < LINEAR_B else self.gain / self.b
        if isinstance(self.span, Tensor):
            return self.span * reference.shrunk_sinh(x / self.span, None, 1.0, self.b, gain, levels, floor)
        return reference.shrunk_sinh(x, None, self.span, self.b, self.span * gain, levels, floor)

    def unit(self, config: ReRAMConfig) -> Any:
        """The current of a fully-on cell at read_voltage, in units of the output where w_scale is 1: a float, or
        (samples, 1)."""
        return self.span * (self.gain * config.device.b() / self.b)

    def unit_square(self, config: ReRAMConfig) -> Any:
        """Its square, a float, or (samples,)."""
        square = self.unit(config) ** 2
        return square[:, 0] if isinstance(square, Tensor) else square


def curve_of(statistics: LayerStatistics) -> Curve:
    """As the layer's numbers say."""
    now = statistics.layer.scalars()
    return Curve(statistics.peaks if now.per_token else now.input_range, now.b, now.gain)


def settle_drive(shared: list[LayerStatistics], config: ReRAMConfig) -> None:
    """Choose for layers that read the same input, so that they can share phi: one range, one shrink and one gain."""
    first = shared[0]
    for statistics in shared:
        statistics.layer.input_offset.copy_(first.offset)
        statistics.layer.input_scale.copy_(first.scale)
    kinds = {"auto": (False, True), "per_token": (True,)}.get(config.input_range, (False,))
    found = [_curve(shared, config, per_token) for per_token in kinds]
    errors = [_error(shared, curve, config) for curve in found] if len(found) > 1 else [0.0]
    best = int(len(found) > 1 and errors[1] < NOTABLE * errors[0])
    curve, per_token = found[best], kinds[best]
    for statistics in shared:
        layer = statistics.layer
        layer.per_token.fill_(per_token)
        layer.input_range.fill_(1.0 if per_token else curve.span)
        layer.input_floor.fill_(_floor(first, curve))
        layer.range_shrink.fill_(curve.b / config.device.b())
        layer.gain.fill_(curve.gain)


def _curve(shared: list[LayerStatistics], config: ReRAMConfig, per_token: bool) -> Curve:
    first = shared[0]
    span: Any = first.peaks
    if not per_token:
        span = first.percentile(config.input_percentile)
        span = span if span > TINY else 1.0  # an input that is always zero: any range holds it
    shrink = config.range_shrink
    if shrink == "auto":
        shrink = _best_shrink(shared, span, config)
    b = config.device.b(shrink)
    return Curve(span, b, _gain(_driven(first, span), b, config))


def _floor(first: LayerStatistics, curve: Curve) -> float:
    return max(-1.0, first.lowest if isinstance(curve.span, Tensor) else first.smallest / curve.span)


def sample_weights(layer: CrossbarLayer, rows: Tensor, inputs: Tensor) -> Tensor:
    """How much each sampled input's output error counts, (samples,). Tokens are normalized one by one later, so theirs
    count relative to their output; pixels are not, and batch norm scales all of them alike."""
    if layer.reads_windows:
        return 1 / torch.bmm(rows.detach().float(), inputs.transpose(1, 2)).square().sum((0, 1)).mean().clamp(
            min=TINY
        ).expand(inputs.shape[1])
    return relative_weights(rows, inputs)


def _driven(statistics: LayerStatistics, span: Any) -> tuple[Tensor, Tensor]:
    """|x| in units of the range, and how often each value came: what a gain is fitted to."""
    if isinstance(span, Tensor):
        u = statistics.samples.flatten()
        every = max(1, u.numel() // _FITTED)
        u = (u[::every] / span.expand_as(statistics.samples).flatten()[::every]).abs()
        return u, torch.ones_like(u)
    met = statistics.counts > 0
    return (statistics.centers()[met] / span).clamp(max=1), statistics.counts[met]


def _gain(driven: tuple[Tensor, Tensor], b: float, config: ReRAMConfig) -> float:
    """The read-out gain times b."""
    if config.gain == "small_signal" or b < LINEAR_B:
        return 1.0
    if config.gain == "full_scale":
        return b * full_scale_gain(b)
    return b * least_squares_gain(*driven, b)


def _best_shrink(shared: list[LayerStatistics], span: Any, config: ReRAMConfig) -> float:
    """The shrink with the least expected output error: non-linearity on sampled inputs + read noise. An ADC has a full
    scale for what is left of the currents, so that its step is the same share of them whatever the shrink."""
    driven = _driven(shared[0], span)
    curves = [Curve(span, b, _gain(driven, b, config)) for b in map(config.device.b, SHRINKS)]
    errors = torch.zeros(len(SHRINKS), dtype=torch.float64)
    for statistics in shared:
        layer, inputs = statistics.layer, statistics.grouped_samples()
        rows = layer.to_rows(cell_weight(layer, layer.weight)).float()
        clipped = inputs if isinstance(span, Tensor) else inputs.clamp(-span, span)
        weights = sample_weights(layer, rows, clipped)
        noise = _read_noise(layer, rows, config)
        for i, (curve, bend) in enumerate(zip(curves, _bends(rows, clipped, weights, curves))):
            errors[i] += bend + float((curve.unit_square(config) * weights).double().mean()) * noise
    return SHRINKS[int(errors.argmin())]


def _bends(rows: Tensor, x: Tensor, weights: Tensor, curves: list[Curve]) -> list[float]:
    """``E w |W (phi(x) - x)|²`` of each curve. As ``phi(x) - x`` is a polynomial in ``u = x / span``, that is a
    quadratic form in its coefficients: a product for each power of u instead of one for each curve.

    Args:
        rows: (groups, channels, crossbar rows). x: within the range, (groups, samples, crossbar rows).
        weights: (samples,).
    """
    span, polynomial = curves[0].span, [curve for curve in curves if curve.b <= reference.POLYNOMIAL_B]
    coefficients = [sinh_coefficients(curve.b) for curve in polynomial]
    degree = max(map(len, coefficients), default=0)
    u, products = x / span, []
    power, square = x.clone(), u * u
    for _ in range(degree):
        products.append((torch.bmm(rows, power.mT) * weights.sqrt()).flatten())
        power *= square
    forms = torch.tensor([[float(torch.dot(p, q)) for q in products] for p in products], dtype=torch.float64)
    found = []
    for curve, c in zip(polynomial, coefficients):
        parts = torch.zeros(degree, dtype=torch.float64)
        parts[: len(c)] = torch.tensor(
            [curve.gain * k * curve.b ** (2 * i) for i, k in enumerate(c)], dtype=parts.dtype
        )
        parts[0] -= 1
        found.append(float(parts @ forms @ parts) / len(weights))
    for curve in curves[len(polynomial) :]:
        bend = torch.bmm(rows, (curve.phi(x) - x).mT).double().square().sum((0, 1))
        found.append(float((bend * weights).mean()))
    return found


def _read_noise(layer: CrossbarLayer, rows: Tensor, config: ReRAMConfig) -> float:
    """Power of the read noise over all columns, in units of the current's, with weight scales as they may become."""
    square = float(layer_scales(layer, rows, typical_clip(config)).double().square().mean())
    return square * rows.shape[0] * rows.shape[1] * layer.tiles() * relative_read_noise(config.device, layer.pairs) ** 2


def _error(shared: list[LayerStatistics], curve: Curve, config: ReRAMConfig) -> float:
    """The expected relative error of the outputs from what drives the arrays and reads them: clamping, DAC, curve, read
    noise and ADC; the mean over all tokens, and that of the worst of the largest ones: what all others attend to is
    one of a thousand, and the model is lost without it."""
    total = 0.0
    levels, floor = dac_grid(config.dac_bits, _floor(shared[0], curve))
    for statistics in shared:
        layer, inputs = statistics.layer, statistics.grouped_samples()
        rows = layer.to_rows(cell_weight(layer, layer.weight)).float()
        weights = sample_weights(layer, rows, inputs)
        phi = curve.phi(inputs, levels, floor)
        error = torch.bmm(rows, (phi - inputs).mT).square().sum((0, 1)) * weights
        noise = _read_noise(layer, rows, config)
        total += float((error + curve.unit_square(config) * weights * noise).double().mean())
        if len(statistics.extremes):
            total += _worst(statistics, rows, curve, levels, floor, noise)
        if config.adc_bits:
            scale = layer.along_rows(layer_scales(layer, rows, typical_clip(config))).expand(rows.shape)
            edge = scale * layer.copies_of_rows()
            total += best_full_scale(layer, rows.clamp(-edge, edge), scale, phi, weights, curve)[1]
    return total


def _worst(statistics: LayerStatistics, rows: Tensor, curve: Curve, levels: int, floor: float, noise: float) -> float:
    """The largest relative error of the largest tokens."""
    x, curve = largest_tokens(statistics, curve)
    error = torch.bmm(rows, (curve.phi(x, levels, floor) - x).mT).square().sum((0, 1))
    unit: Any = curve.unit_square(statistics.layer.crossbar.config)
    return float(((error + unit * noise) * relative_weights(rows, x)).max())


def largest_tokens(statistics: LayerStatistics, curve: Curve, which: Any = slice(None)) -> tuple[Tensor, Curve]:
    """The inputs that are kept because they are the largest, (groups, samples, crossbar rows), and the curve with their
    range. What all others attend to is one token of a thousand, and the model is lost without it."""
    extremes = statistics.extremes[which]
    x, peaks = statistics.grouped(extremes[:, :-1]), extremes[:, -1:]
    return x, curve._replace(span=peaks) if isinstance(curve.span, Tensor) else curve


def best_full_scale(
    layer: CrossbarLayer, held: Tensor, scale: Tensor, phi: Tensor, weights: Tensor, curve: Curve
) -> tuple[float, float]:
    """The ADC's full scale with the least expected output error, in currents of a fully-on cell at read_voltage, and
    that error: a full scale for the largest current leaves all others few codes where rare tokens are huge.

    Args:
        held: weights in the cells, (groups, channels of a group, crossbar rows). scale: w_scale, of its shape.
        phi: (groups, samples, crossbar rows). weights: (samples,), what the error of each counts.
    """
    config = layer.crossbar.config
    unit = curve.unit(config)
    unit = unit.mT if isinstance(unit, Tensor) else unit  # along the samples
    currents, powers = [], []
    for tile in zip(*(t.split(layer.tile_rows(), 2) for t in (held, scale, phi))):
        cells, units, driven = tile[0], tile[1][..., :1] * unit, tile[2]
        currents.append(torch.bmm(cells, driven.mT) / units.clamp(min=TINY))
        powers.append(units.square() * weights)
    noise = relative_read_noise(config.device, layer.pairs)
    largest = max(float(current.abs().max()) for current in currents) + 3 * noise
    levels, candidates = converter_levels(config.adc_bits), [largest * share for share in FULL_SCALES]
    if not levels or not largest:
        return candidates[0], 0.0
    errors: Any = sum(conversion_errors(c, power, candidates, levels, noise) for c, power in zip(currents, powers))
    best = int(errors.argmin())
    return candidates[best], float(errors[best]) / len(weights)
