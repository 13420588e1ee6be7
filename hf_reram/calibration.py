"""Choose each layer's input range, shrink, gain, weight scale and ADC range from a few batches.

Statistics are taken of the digital model in one pass over the batches, in memory that does not grow with them: for
each layer a histogram of |x| on a logarithmic scale, and a uniform random sample of the vectors that meet the array
(reservoir sampling by random keys).
"""

import itertools
import math
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .config import ReRAMConfig, converter_levels
from .deployment import digital_eval
from .device.iv import LINEAR_B, full_scale_gain, least_squares_gain
from .mapping import expected_error, layer_scales, relative_weights
from .nn import CrossbarConv2d, CrossbarMixin
from .nn.cells import WeightVariance
from .nn.scalars import read_scalars
from .outputs import call_model
from .patching import crossbar_layers, crossbar_state
from .redundancy import allot_pairs
from .sensitivity import measure_sensitivity

logger = logging.get_logger(__name__)

# Histogram of |x|: 64 bins an octave from 2^-40 to 2^40 resolve a range to 1 %.
_BINS_PER_OCTAVE, _OCTAVES = 64, 80
_BINS = _BINS_PER_OCTAVE * _OCTAVES

# Sampled vectors a layer, and a bound on their elements (8 MiB in float32).
_SAMPLES, _SAMPLE_ELEMENTS = 256, 1 << 21

# Share of the input's power from which on an offset is subtracted.
WORTHWHILE = 0.1

# Up to which an input is no signal; the inverse of a smaller range could overflow.
TINY = 1e-30

# Candidates for the exponent of the input scales, the share of the error that they may leave at most, and a bound.
POWERS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
GAINED = 0.9
TYPICAL_CLIP = 3.0  # RMS, in place of "auto" while the scales are chosen
LARGEST_SCALE = 30.0

# Candidates for range_shrink="auto".
SHRINKS = tuple(0.02 * 50 ** (i / 31) for i in range(32))


class LayerStatistics:
    """What calibration keeps of one layer's inputs.

    Attributes:
        counts: (bins,) histogram of |x|, in double precision. largest: max |x|. smallest: min x, at most 0.
        samples: (at most 256, groups · rows) vectors that met the array.
        offset, scale: (input channels,), subtracted from the input, zero where that does not help, and what it is
            divided by then, one where that does not help; from the first batch.
    """

    def __init__(self, layer: CrossbarMixin, name: str, seed: int):
        self.layer, self.name = layer, name
        self.offset: Any = None
        self.scale: Any = None
        device = layer.weight.device
        self.counts = torch.zeros(_BINS, dtype=torch.float64, device=device)
        self.largest = self.smallest = 0.0
        self.samples: Any = None  # a tensor once data have come
        self.keys: Any = None
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, x: Tensor, keep: Tensor | None) -> None:
        """Take in one batch; ``keep`` is 0 at padding tokens."""
        x = x.detach().float()
        if keep is not None:
            x = x.reshape(-1, x.shape[-1])[keep.bool()]
        if x.numel() == 0:
            return
        if self.offset is None:
            config = self.layer.crossbar.config
            self.offset = _offset(x, self.layer) if config.center_inputs else torch.zeros_like(_offset(x, self.layer))
            centered = self.layer.center(x, self.offset)
            self.scale = _scale(centered, self) if config.equalize_inputs else torch.ones_like(self.offset)
        x = self.layer.equalize(self.layer.center(x, self.offset), self.scale)
        magnitude = x.abs().reshape(-1)
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise ValueError(f"calibration data drive layer {self.name!r} with NaN or infinite values")
        self.largest, self.smallest = max(self.largest, largest), min(self.smallest, float(x.min()))
        index = (magnitude.clamp(min=1e-30).log2() + _OCTAVES // 2).mul_(_BINS_PER_OCTAVE).long().clamp_(0, _BINS - 1)
        self.counts += torch.bincount(index, minlength=_BINS)
        self._sample(self.vectors(x))

    def follow(self, leader: "LayerStatistics") -> None:
        """Take over the offset and the scales of a layer that reads the same input."""
        self.offset, self.scale = leader.offset, leader.scale

    def vectors(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, CrossbarConv2d):
            return x.reshape(-1, x.shape[-1])
        images = x if x.dim() == 4 else x[None]
        pick = torch.randperm(len(images), generator=self.generator)[:4]
        columns = torch.cat([self.layer.unfold(images[i : i + 1])[0] for i in pick.tolist()], 1)
        return columns.t()

    def _sample(self, vectors: Tensor) -> None:
        size = max(1, min(_SAMPLES, _SAMPLE_ELEMENTS // vectors.shape[1]))
        keys = torch.rand(len(vectors), generator=self.generator)
        if len(vectors) > size:
            keys, best = keys.topk(size)
            vectors = vectors[best.to(vectors.device)]
        if self.samples is not None:
            keys, vectors = torch.cat([self.keys, keys]), torch.cat([self.samples, vectors])
            keys, best = keys.topk(min(size, len(keys)))
            vectors = vectors[best.to(vectors.device)]
        self.keys, self.samples = keys, vectors.clone()

    # What follows from them

    def centers(self) -> Tensor:
        """The |x| that stands for each bin, (bins,)."""
        octave = (torch.arange(_BINS, dtype=torch.float64, device=self.counts.device) + 0.5) / _BINS_PER_OCTAVE
        return torch.exp2(octave - _OCTAVES // 2).clamp(max=max(self.largest, 1e-30))

    def percentile(self, percent: float) -> float:
        """The given percentile of |x|, interpolated within its bin."""
        total = float(self.counts.sum())
        if percent >= 100 or total == 0 or self.largest == 0:
            return self.largest
        below = self.counts.cumsum(0)
        target = total * percent / 100
        index = min(int(torch.searchsorted(below, target)), _BINS - 1)
        start = float(below[index - 1]) if index else 0.0
        inside = (target - start) / max(float(self.counts[index]), 1e-30)
        return min(2.0 ** ((index + inside) / _BINS_PER_OCTAVE - _OCTAVES // 2), self.largest)

    def grouped_samples(self) -> Tensor:
        """(groups, samples, crossbar rows)."""
        return self.grouped(self.samples)

    def grouped(self, vectors: Tensor) -> Tensor:
        """Vectors that meet the array, group by group."""
        groups = self.layer.groups if isinstance(self.layer, CrossbarConv2d) else 1
        return vectors.view(len(vectors), groups, -1).transpose(0, 1)


def _offset(x: Tensor, layer: CrossbarMixin) -> Tensor:
    """Mean of each input channel, or zeros where leaving them out takes less than :data:`WORTHWHILE` off the power,
    as a whole and averaged over channels (those of a depthwise convolution do not mix)."""
    channel = x.dim() - 3 if isinstance(layer, CrossbarConv2d) else x.dim() - 1
    flat = x.transpose(0, channel).flatten(1)
    mean, power = flat.mean(1), flat.square().mean(1)
    share = mean.square() / power.clamp(min=1e-30)
    whole = mean.square().sum() / power.sum().clamp(min=1e-30)
    return mean if max(float(whole), float(share.mean())) > WORTHWHILE else torch.zeros_like(mean)


def _scale(x: Tensor, statistics: LayerStatistics) -> Tensor:
    """Scales of the input channels, (rms of the input / rms of the weights)^p, with the p of the least expected output
    error (spread of retention, read noise and DAC step); ones where that leaves more than :data:`GAINED` of the error.

    Args:
        x: centered, as the layer reads it.
    """
    layer, config = statistics.layer, statistics.layer.crossbar.config
    rows = layer._rows(layer.weight.detach()).float()
    groups, columns, width = rows.shape
    power, largest, importance = _channel_power(x, statistics, rows)
    of_weights = rows.square().mean(1).view(groups, -1, width * groups // len(power)).mean(2)
    ratio = (power.view(groups, -1) / of_weights.clamp(min=TINY)).clamp(min=TINY).sqrt()
    ratio = (ratio / ratio.log().median().exp()).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    current = config.device.relative_read_noise(layer.pairs)
    levels, error = converter_levels(config.dac_bits), layer.error
    clip = TYPICAL_CLIP if config.weight_clip == "auto" else config.weight_clip
    best, least = torch.ones_like(ratio), math.inf
    for exponent in POWERS:
        scale = ratio**exponent
        along = scale.repeat_interleave(width * groups // len(power), 1)[:, None]
        cells = rows * along
        held = layer_scales(layer, cells, clip)
        spread = WeightVariance.apply(cells, layer.along_rows(held).expand(cells.shape), error).sum(1)
        spread = spread / along[:, 0].square()
        total = float((spread.view(groups, scale.shape[1], -1).sum(2) * power.view(groups, -1)).sum())
        noise = float(held.square().mean()) * groups * columns * layer.tiles() * current**2
        step = float(cells.square().sum()) / (12 * levels**2) if levels else 0.0
        total += importance * float((largest.view(groups, -1) / scale).max()) ** 2 * (noise + step)
        if total < least:
            best, least = scale, total * (1 if exponent else GAINED)
    return best.reshape(-1)


def _channel_power(x: Tensor, statistics: LayerStatistics, rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of each input channel the mean square, weighted as :func:`_sample_weights` says, and the largest magnitude; and
    the mean of the weights."""
    if isinstance(statistics.layer, CrossbarConv2d):  # of every pixel: few of them may drive a channel at all
        flat = x.transpose(0, x.dim() - 3).flatten(1)
        return flat.square().mean(1), flat.abs().amax(1), 1.0
    tokens = x.reshape(-1, x.shape[-1])
    tokens = tokens[:: max(1, len(tokens) // 2048)]
    weights = relative_weights(rows, tokens[None])
    return (tokens.square() * weights[:, None]).mean(0), tokens.abs().amax(0), float(weights.mean())


def calibrate(model: nn.Module, batches: Iterable, sensitivity: bool | None = None) -> nn.Module:
    """Set every crossbar layer's input range, shrink, gain, weight scale, ADC range and pairs per weight, in place.

    Args:
        model: patched by :func:`patch_model`.
        batches: what the model is called with: dicts of its arguments, tuples or tensors; at most
            ``config.calibration_batches`` of them are read. Where a batch has a 2-D ``attention_mask``, padding
            tokens are left out.
        sensitivity: also measure each output channel's Fisher information, needed for ``retention_loss``
            "sensitivity"; None: where the config asks for it.

    Raises:
        ValueError: the model is not patched or is deployed, there is no batch, or a batch drives a layer with NaN.
    """
    state, layers = crossbar_state(model), crossbar_layers(model)
    config = state.config
    if any(layer.deployed is not None for layer in layers.values()):
        raise ValueError("the model is deployed as a chip, whose cells are programmed: calibrate it outside of deploy")
    for layer in layers.values():
        layer.pairs_per_weight.fill_(1.0)
    statistics = {name: LayerStatistics(layer, name, seed) for seed, (name, layer) in enumerate(layers.items())}
    groups: dict[str, str] = {}
    if sensitivity is None:
        sensitivity = state.term == "sensitivity"
    kept = []
    with _observed(model, statistics, groups) as look:
        for batch in itertools.islice(batches, config.calibration_batches):
            call_model(model, batch)
            look()
            if sensitivity:
                kept.append(batch)
    if all(s.samples is None for s in statistics.values()):
        raise ValueError("the calibration set is empty: calibrate needs at least one batch with at least one example")
    unseen = [name for name, s in statistics.items() if s.samples is None]
    if unseen:
        logger.warning("calibration data reach %d layers not at all, which stay uncalibrated: %s", len(unseen), unseen)
    with torch.no_grad():
        followers: dict[str, list[LayerStatistics]] = {}
        for name, leader in groups.items():
            if statistics[name].samples is not None:
                followers.setdefault(leader, []).append(statistics[name])
        for shared in followers.values():
            _settle(shared, config)
        if config.redundancy:
            _spread_pairs(statistics, config)
            for shared in followers.values():
                if any(s.layer.pairs > 1 for s in shared):
                    _settle(shared, config)  # quieter cells: other ranges and scales may be best
    if sensitivity:
        measure_sensitivity(model, kept)
    return model


@contextmanager
def _observed(model: nn.Module, statistics: dict[str, LayerStatistics], groups: dict[str, str]):
    """The digital model in eval mode, each layer's input going to its statistics."""
    state = crossbar_state(model)
    last: list = [None, None]  # the input seen last and the layer that saw it first

    outputs: list[tuple[Any, Tensor, int]] = []  # of the first batch: (layer, output, its version then)

    def hold(layer, args, y):
        outputs.append((layer, y, -1 if y.is_inference() else y._version))

    def observe(layer, args):
        name, x = layer.crossbar_name, args[0]
        if last[0] is not x:
            last[:] = [x, name]
        groups.setdefault(name, last[1])
        if statistics[name].offset is None and groups[name] != name:
            statistics[name].follow(statistics[groups[name]])
        statistics[name].update(x, state.keep(x))

    hooks = [s.layer.register_forward_pre_hook(observe) for s in statistics.values()]
    holds = [s.layer.register_forward_hook(hold) for s in statistics.values()]

    def look() -> None:
        """See, after the first batch, which outputs the model has changed in place."""
        changed = {layer.crossbar_name for layer, y, version in outputs if version < 0 or y._version != version}
        for layer, *_ in outputs:
            layer.copies_output = layer.crossbar_name in changed
        outputs.clear()
        for hook in holds:
            hook.remove()

    try:
        with digital_eval(model), torch.no_grad():
            yield look
    finally:
        state.mask = None
        look()
        for hook in hooks:
            hook.remove()


def _settle(shared: list[LayerStatistics], config: ReRAMConfig) -> None:
    """Choose for layers that read the same input, so that they can share phi: one range and one shrink."""
    first = shared[0]
    for statistics in shared:
        statistics.layer.input_offset.copy_(first.offset)
        statistics.layer.input_scale.copy_(first.scale)
    span = first.percentile(config.input_percentile)
    span = span if span > TINY else 1.0  # an input that is always zero: any range holds it
    shrink = _best_shrink(shared, span, config) if config.range_shrink == "auto" else config.range_shrink
    gain = _gain(first, span, config.device.b(shrink), config)
    for statistics in shared:
        layer = statistics.layer
        layer.input_range.fill_(span)
        layer.input_floor.fill_(max(-1.0, first.smallest / span))
        layer.range_shrink.fill_(shrink)
        layer.gain.fill_(gain)
        rows, inputs = _weighted_inputs(statistics)
        layer.weight_scale.copy_(layer_scales(layer, rows, config.weight_clip, inputs))
        layer.adc_range.fill_(_largest_current(statistics, span, config))
        layer.forget_white_noise()
        layer.scalars()


def _spread_pairs(statistics: dict[str, LayerStatistics], config: ReRAMConfig) -> None:
    """Give the layers their pairs per weight, from the shares of their outputs' power that the spread of their cells
    has."""
    errors, cells = [], []
    for found in statistics.values():
        layer, error = found.layer, 0.0
        if found.samples is not None:
            rows, inputs = _weighted_inputs(found)
            scale = layer.along_rows(layer.weight_scale)
            error = float(expected_error(rows.float(), scale, layer.error, inputs, 0.0).sum())
        errors.append(error)
        cells.append(layer.weight.numel())
    for found, pairs in zip(statistics.values(), allot_pairs(errors, cells, config.redundancy * sum(cells))):
        found.layer.pairs_per_weight.fill_(pairs)
        found.layer.forget_white_noise()


def _weighted_inputs(statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
    """The layer's weights, and phi of the sampled inputs scaled by the root of :func:`_sample_weights`, both by rows
    of the array."""
    layer = statistics.layer
    span, b, gain, *_ = read_scalars(layer)
    rows, inputs = layer._rows(layer.cell_weight()), _phi(statistics.grouped_samples(), span, b, gain)
    return rows, inputs * _sample_weights(layer, rows, inputs).sqrt()[:, None]


def _sample_weights(layer: CrossbarMixin, rows: Tensor, inputs: Tensor) -> Tensor:
    """How much each sampled input's output error counts, (samples,). Tokens are normalized one by one later, so theirs
    count relative to their output; pixels are not, and batch norm scales all of them alike."""
    if isinstance(layer, CrossbarConv2d):
        return 1 / torch.bmm(rows.detach().float(), inputs.transpose(1, 2)).square().sum((0, 1)).mean().clamp(
            min=TINY
        ).expand(inputs.shape[1])
    return relative_weights(rows, inputs)


def _phi(x: Tensor, span: float, b: float, gain: float) -> Tensor:
    u = (x / span).clamp(-1, 1)
    return span * gain * (u if b < LINEAR_B else torch.sinh(b * u) / b)


def _gain(statistics: LayerStatistics, span: float, b: float, config: ReRAMConfig) -> float:
    """The read-out gain times b."""
    if config.gain == "small_signal" or b < LINEAR_B:
        return 1.0
    if config.gain == "full_scale":
        return b * full_scale_gain(b)
    u = (statistics.centers() / span).clamp(max=1)
    return b * least_squares_gain(u, statistics.counts, b)


def _best_shrink(shared: list[LayerStatistics], span: float, config: ReRAMConfig) -> float:
    """The shrink with the least expected output error: non-linearity on sampled inputs + read noise + ADC step."""
    errors = torch.zeros(len(SHRINKS), dtype=torch.float64)
    for statistics in shared:
        layer, inputs = statistics.layer, statistics.grouped_samples()
        rows = layer._rows(layer.cell_weight()).float()
        clipped = inputs.clamp(-span, span)
        weights = _sample_weights(layer, rows, clipped).double()
        scale = layer_scales(layer, rows, None)
        square = float(scale.double().square().mean()) * rows.shape[0] * rows.shape[1] * layer.tiles()
        noise = config.device.relative_read_noise(layer.pairs) ** 2
        if levels := converter_levels(config.adc_bits):
            step = _largest_current(statistics, span, config) / levels
            noise += step**2 / 12
        for i, shrink in enumerate(SHRINKS):
            b = config.device.b(shrink)
            gain = _gain(statistics, span, b, config)
            bend = torch.bmm(rows, (_phi(inputs, span, b, gain) - clipped).transpose(1, 2))
            unit = span * gain * config.device.b() / b
            errors[i] += float(
                (bend.double().square().sum((0, 1)) * weights).mean() + weights.mean() * (unit**2 * square * noise)
            )
    return SHRINKS[int(errors.argmin())]


def _largest_current(statistics: LayerStatistics, span: float, config: ReRAMConfig) -> float:
    """The full scale that the ADC was sized for: the largest column current on the samples at range_shrink = 1 and a
    quarter more, since they are only samples; in currents of a fully-on cell at read_voltage."""
    layer = statistics.layer
    rows = layer._rows(layer.cell_weight()).float()
    scale = layer.along_rows(layer_scales(layer, rows, None))
    b = config.device.b()
    drive = _phi(statistics.grouped_samples() / span, 1.0, b, 1.0)
    cells = rows / scale.clamp(min=1e-30)
    parts = zip(cells.split(layer.tile_rows(), 2), drive.split(layer.tile_rows(), 2))
    return 1.25 * max(float(torch.bmm(w, s.transpose(1, 2)).abs().max()) for w, s in parts)
