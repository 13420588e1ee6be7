"""Choose each layer's input range, shrink, gain, weight scale and ADC range from a few batches.

Statistics are taken of the digital model in two passes over the batches, the first for what is subtracted from each
input channel (and what it is divided by), the second for the rest: for each layer a histogram of |x| on a logarithmic
scale, and a uniform random sample of the vectors that meet the array.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import ReRAMConfig, converter_levels
from ..device.iv import LINEAR_B, full_scale_gain, least_squares_gain
from ..device.read_noise import relative_read_noise
from ..model.deploy import digital_eval, refuse_offloaded, warn_uncalled
from ..model.find import arrays, crossbar_layers, crossbar_states, is_chip
from ..model.inputs import call_model, uncompiled
from ..model.sharding import gathered, is_sharded, of_first, processes, reshard
from ..nn import CrossbarLayer
from ..nn.array import cell_weight, program
from ..nn.converter import conversion_errors
from ..nn.layer import BUFFERS
from ..nn.mapping import Inputs, expected_error, layer_scales, relative_weights
from ..nn.ops import reference
from ..nn.scalars import read_scalars
from ..nn.tensors import is_shard, tensors_of, whole
from .input_scales import TINY, TYPICAL_CLIP
from .redundancy import allot_pairs
from .sensitivity import measure_sensitivity
from .statistics import Channels, LayerStatistics, NotFiniteError

logger = logging.get_logger(__name__)

# Candidates for range_shrink="auto", and for the ADC's full scale in largest sampled currents: more than 1, since they
# are only samples.
SHRINKS = tuple(0.02 * 50 ** (i / 31) for i in range(32))
FULL_SCALES = tuple(1.25 * 2 ** (-i / 6) for i in range(49))


@torch.inference_mode(False)  # training may follow
def calibrate(model: nn.Module, batches: Iterable, sensitivity: bool | None = None) -> nn.Module:
    """Set every crossbar layer's input range, shrink, gain, weight scale, ADC range and pairs per weight, in place; of
    all layers or, where it fails, of none. Of weights that are sharded (FSDP2) all processes calibrate together, with
    as many batches each, and the numbers are those of the first one's.

    Args:
        model: patched by :func:`patch_model`, or of parts that were.
        batches: what the model is called with: dicts of its arguments, tuples or tensors; at most
            ``config.calibration_batches`` of them are read, and kept while it runs. Where a batch has a 2-D
            ``attention_mask``, padding tokens are left out.
        sensitivity: also measure each output channel's Fisher information, needed for ``retention_loss``
            "sensitivity"; None: where the config asks for it.

    Raises:
        ValueError: the model is not patched or is deployed, there is no batch, or a batch drives a layer with NaN.
        TypeError: no batches, or what is none among them.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        raise TypeError(
            f"batches of type {type(batches).__name__}: allowed is a list of batches, or another iterable; of a "
            "single batch, [batch]"
        )
    states, layers = crossbar_states(model), crossbar_layers(model)
    refuse_offloaded(model)
    if is_chip(model):
        raise ValueError("the model is deployed as a chip, whose cells are programmed: calibrate it outside of deploy")
    if sensitivity is None:
        sensitivity = any(state.term == "sensitivity" for state in states)
    statistics = {name: LayerStatistics(layer, name, seed) for seed, (name, layer) in enumerate(layers.items())}
    kept = list(map(_ordinary, itertools.islice(batches, max(s.config.calibration_batches for s in states))))
    observation = _Observation(layers)
    with uncompiled(), observation.watching(model):  # compiled code may have no hooks
        if any(state.config.center_inputs or state.config.equalize_inputs for state in states):
            channels = {name: Channels(layer, name, seed) for seed, (name, layer) in enumerate(layers.items())}
            observation.run(model, kept, channels, of_leaders=True)
            reshard(model)
            for name, leader in observation.leaders.items():
                if observation.leaders[leader] != leader:  # which has read another input before
                    leader = name
                with gathered([layers[leader]]):
                    channels[leader].give(statistics[name])
            _share_input_scales(statistics, observation.leaders)
        observation.run(model, kept, statistics)
    reshard(model)
    if all(s.samples is None for s in statistics.values()):
        raise ValueError("the calibration set is empty: calibrate needs at least one batch with at least one example")
    unseen = [name for name, s in statistics.items() if s.samples is None]
    if unseen:
        warn_uncalled(model, "are not reached by calibration data, and stay as they were", unseen)
    with _all_or_nothing(layers.values()):
        with torch.no_grad():
            for layer in layers.values():
                layer.copies_output = layer in observation.changed
                layer.pairs_per_weight.fill_(1.0)
            for state in states:
                own = {name: s for name, s in statistics.items() if s.layer.crossbar is state}
                _settle_all(own, observation.leaders, state.config)
        if sensitivity:
            measure_sensitivity(model, kept)
        if processes() > 1 and is_sharded(model):
            _take_first_process(layers.values())
    return model


class _Observation:
    """Passes of the digital model over the calibration data.

    Attributes:
        leaders: of each layer that was seen, the first one that read the same input, by their names.
        changed: layers whose output the model has changed in place.
    """

    def __init__(self, layers: dict[str, CrossbarLayer]):
        self.layers = layers
        self.names = {layer: name for name, layer in layers.items()}
        self.leaders: dict[str, str] = {}
        self._takers: Any = {}  # of inputs, by layer name
        self._of_leaders = False
        self.changed: set[nn.Module] = set()
        self._last: Any = (None, None)  # the input seen last and the layer that saw it first
        self._outputs: list[tuple[nn.Module, Tensor, int]] = []  # of the first batch, with their versions then
        self._holds: list[Any] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """The digital model in eval mode, so that :meth:`run` sees each layer's input."""
        hooks = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self.names]
        self._holds = [layer.register_forward_hook(self._hold) for layer in self.names]
        try:
            with digital_eval(model), torch.no_grad():
                yield
        finally:
            self.stop_holding()
            for hook in hooks:
                hook.remove()

    def run(self, model: nn.Module, batches: list, takers: dict[str, Any], of_leaders: bool = False) -> None:
        """One pass.

        Args:
            takers: get the inputs, by layer name. of_leaders: only those of layers that read an input first.
        """
        self._takers, self._of_leaders = takers, of_leaders
        for batch in batches:
            try:
                call_model(model, batch)
            except NotFiniteError:
                raise
            except (TypeError, LookupError, AttributeError, ValueError) as error:
                given = f" of {list(batch)}" if isinstance(batch, Mapping) else ""
                raise (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"the model cannot be called with a batch of type {type(batch).__name__}{given}: allowed is what "
                    f"its forward takes: a dict of its arguments, a tuple of inputs and labels, or a tensor ({error})"
                ) from error
            self.stop_holding()

    def _see(self, layer, args, kwargs) -> None:
        name, x = self.names[layer], tensors_of((args, kwargs))[0]
        first = self.layers[self._last[1]] if self._last[0] is x else None
        if first is None or first.crossbar is not layer.crossbar or first.channel_dim != layer.channel_dim:
            self._last = (x, name)
        leader = self.leaders.setdefault(name, self._last[1])
        if self._of_leaders and name != leader == self.leaders[leader]:
            return
        keep = layer.crossbar.forward.padding.keep(x) if layer.channel_dim == -1 else None
        self._takers[name].update(x, keep)

    def _hold(self, layer, args, y) -> None:
        self._outputs.append((layer, y, y._version))

    def stop_holding(self) -> None:
        """See which of the outputs so far the model has changed in place, and let go of them."""
        self.changed |= {layer for layer, y, version in self._outputs if y._version != version}
        self._outputs.clear()
        for hook in self._holds:
            hook.remove()


# What calibration sets beside buffers.
KEPT = ("sensitivity", "copies_output", "clipped_by_choice", "choice_is_known")


@contextmanager
def _all_or_nothing(layers: Iterable[Any]) -> Iterator[None]:
    """Layers as they were before if what is inside fails."""
    before = [
        (
            layer,
            {name: getattr(layer, name).detach().clone() for name in BUFFERS},
            {name: getattr(layer, name) for name in KEPT},
        )
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        for layer, buffers, attributes in before:
            for name, value in attributes.items():
                setattr(layer, name, value)
            for name, value in buffers.items():
                getattr(layer, name).detach().copy_(value)
            layer.forget_white_noise()
            layer.scalars()
        raise


@torch.no_grad()
def _take_first_process(layers: Iterable[Any]) -> None:
    """A chip of weights that are sharded is one chip, with one input range."""
    for layer in layers:
        numbers = {name: whole(getattr(layer, name).detach()).cpu() for name in BUFFERS}
        numbers, layer.copies_output, sensitivity = of_first((numbers, layer.copies_output, layer.sensitivity))
        if sensitivity is not None:
            layer.sensitivity = sensitivity.to(layer.input_offset.device)
        for name, value in numbers.items():
            own = getattr(layer, name)
            own.fill_(float(value)) if is_shard(own) else own.copy_(value)
        layer.forget_white_noise()
        layer.scalars()


def _ordinary(batch: Any) -> Any:
    """The batch without tensors that autograd refuses, as they are made under ``torch.inference_mode``."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {key: _ordinary(value) for key, value in batch.items()}
    return type(batch)(map(_ordinary, batch)) if type(batch) in (list, tuple) else batch


def _settle_all(statistics: dict[str, LayerStatistics], leaders: dict[str, str], config: ReRAMConfig) -> None:
    """Choose the numbers of layers that were patched together."""
    followers: dict[str, list[LayerStatistics]] = {}
    for name, found in statistics.items():
        if found.samples is not None:
            followers.setdefault(leaders[name], []).append(found)
    held = _arrays(statistics)
    for shared in followers.values():
        with gathered(s.layer for s in shared):
            _settle(shared, config)
    _share_scales(held)
    if config.redundancy:
        _spread_pairs(held, config)
        for shared in followers.values():
            with gathered(s.layer for s in shared):
                if any(s.layer.pairs > 1 for s in shared):
                    _settle(shared, config)  # quieter cells: other ranges and scales may be best
        _share_scales(held)


def _arrays(statistics: dict[str, LayerStatistics]) -> list[list[LayerStatistics]]:
    """By the array that holds their weight."""
    layers = {name: found.layer for name, found in statistics.items()}
    return [[statistics[name] for name in same] for same in arrays(layers)]


def _share_input_scales(statistics: dict[str, LayerStatistics], leaders: dict[str, str]) -> None:
    """One array holds one weight times one scale of its inputs: that of the first of the layers, which those that read
    the others' inputs get too."""
    for same in _arrays(statistics):
        for found in same[1:]:
            leader = leaders.get(found.name)
            for name, other in statistics.items():
                if leader is not None and leaders.get(name) == leader:
                    other.scale = same[0].scale


def _share_scales(held: list[list[LayerStatistics]]) -> None:
    """Give layers that share cells one weight scale."""
    for same in held:
        seen = [found for found in same if found.samples is not None]
        if len(seen) > 1:
            with gathered(found.layer for found in seen):
                _scale(seen)


def _scale(same: list[LayerStatistics]) -> None:
    """Give layers of one array the weight scale with the least expected error over the inputs of all of them, and each
    the full scale of its ADC."""
    layer = same[0].layer
    rows, several = _weighted_inputs(same[0])[0], [_weighted_inputs(found)[1] for found in same]
    phi = torch.cat([inputs.phi for inputs in several], 1)
    offset = torch.cat([inputs.offset.expand(inputs.phi.shape) for inputs in several], 1)  # type: ignore[union-attr]
    noise = sum(inputs.read_noise for inputs in several) / len(several)
    scale = layer_scales(layer, rows, layer.crossbar.config.weight_clip, Inputs(phi, offset, noise))
    for found in same:
        found.layer.weight_scale.copy_(scale)
        found.layer.adc_range.fill_(_best_full_scale(found))
        found.layer.forget_white_noise()
        found.layer.scalars()
        found.layer.note_choice()


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
        _scale([statistics])


def _spread_pairs(held: list[list[LayerStatistics]], config: ReRAMConfig) -> None:
    """Give the arrays their pairs per weight, from the shares of their layers' outputs' power that the spread of their
    cells has."""
    errors, cells = [], []
    for array in held:
        error = 0.0
        for found in array:
            layer = found.layer
            if found.samples is not None:
                with gathered([layer]):
                    rows, inputs = _weighted_inputs(found)
                scale = layer.along_rows(layer.weight_scale)
                error += float(expected_error(rows.float(), scale, layer.error, Inputs(inputs.phi), 0.0).sum())
        errors.append(error)
        cells.append(array[0].layer.weight.numel())
    for array, pairs in zip(held, allot_pairs(errors, cells, config.redundancy * sum(cells))):
        for found in array:
            found.layer.pairs_per_weight.fill_(pairs)
            found.layer.forget_white_noise()


def _weighted_inputs(statistics: LayerStatistics) -> tuple[Tensor, Inputs]:
    """The layer's weights by rows of the array, and what meets them, scaled by the root of :func:`_sample_weights`."""
    layer, config = statistics.layer, statistics.layer.crossbar.config
    span, b, gain, *_ = read_scalars(layer)
    rows, phi, weights = _sampled(statistics)
    offset = (statistics.offset / statistics.scale).view(layer.groups, -1).repeat_interleave(layer.area, 1)
    factor = weights.sqrt()[:, None]
    read = relative_read_noise(config.device, layer.pairs) * _unit(config, span, b, gain)
    return rows, Inputs(phi * factor, offset[:, None] * factor, float(weights.mean()) * read**2)


def _sampled(statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's weights by rows of the array, phi of the sampled inputs, and how much each of them counts."""
    layer = statistics.layer
    span, b, gain, *_ = read_scalars(layer)
    rows, phi = layer.to_rows(cell_weight(layer, layer.weight)), _phi(statistics.grouped_samples(), span, b, gain)
    return rows, phi, _sample_weights(layer, rows, phi)


def _unit(config: ReRAMConfig, span: float, b: float, gain: float) -> float:
    """The current of a fully-on cell at read_voltage, in units of the output where w_scale is 1."""
    return span * gain * config.device.b() / b


def _sample_weights(layer: CrossbarLayer, rows: Tensor, inputs: Tensor) -> Tensor:
    """How much each sampled input's output error counts, (samples,). Tokens are normalized one by one later, so theirs
    count relative to their output; pixels are not, and batch norm scales all of them alike."""
    if layer.reads_windows:
        return 1 / torch.bmm(rows.detach().float(), inputs.transpose(1, 2)).square().sum((0, 1)).mean().clamp(
            min=TINY
        ).expand(inputs.shape[1])
    return relative_weights(rows, inputs)


def _phi(x: Tensor, span: float, b: float, gain: float) -> Tensor:
    return reference.shrunk_sinh(x, None, span, b, span * (gain if b < LINEAR_B else gain / b), 0, -1.0)


def _gain(statistics: LayerStatistics, span: float, b: float, config: ReRAMConfig) -> float:
    """The read-out gain times b."""
    if config.gain == "small_signal" or b < LINEAR_B:
        return 1.0
    if config.gain == "full_scale":
        return b * full_scale_gain(b)
    u = (statistics.centers() / span).clamp(max=1)
    return b * least_squares_gain(u, statistics.counts, b)


def _best_shrink(shared: list[LayerStatistics], span: float, config: ReRAMConfig) -> float:
    """The shrink with the least expected output error: non-linearity on sampled inputs + read noise. An ADC has a full
    scale for what is left of the currents, so that its step is the same share of them whatever the shrink."""
    errors = torch.zeros(len(SHRINKS), dtype=torch.float64)
    for statistics in shared:
        layer, inputs = statistics.layer, statistics.grouped_samples()
        rows = layer.to_rows(cell_weight(layer, layer.weight)).float()
        clipped = inputs.clamp(-span, span)
        weights = _sample_weights(layer, rows, clipped).double()
        clip = TYPICAL_CLIP if config.weight_clip == "auto" else config.weight_clip
        scale = layer_scales(layer, rows, clip)
        square = float(scale.double().square().mean()) * rows.shape[0] * rows.shape[1] * layer.tiles()
        noise = relative_read_noise(config.device, layer.pairs) ** 2
        for i, shrink in enumerate(SHRINKS):
            b = config.device.b(shrink)
            gain = _gain(statistics, span, b, config)
            bend = torch.bmm(rows, (_phi(inputs, span, b, gain) - clipped).transpose(1, 2))
            unit = _unit(config, span, b, gain)
            errors[i] += float(
                (bend.double().square().sum((0, 1)) * weights).mean() + weights.mean() * (unit**2 * square * noise)
            )
    return SHRINKS[int(errors.argmin())]


def _best_full_scale(statistics: LayerStatistics) -> float:
    """The ADC's full scale with the least expected output error, in currents of a fully-on cell at read_voltage: one
    for the largest current leaves all others few codes where rare tokens are huge."""
    layer, config = statistics.layer, statistics.layer.crossbar.config
    span, b, gain, *_ = read_scalars(layer)
    _, phi, weights = _sampled(statistics)
    held = layer.to_rows(program(layer, layer.weight)).float()
    units = layer.along_rows(layer.weight_scale).expand(held.shape) * _unit(config, span, b, gain)
    currents, powers = [], []
    for tile in zip(*(t.split(layer.tile_rows(), 2) for t in (held, units, phi))):
        cells, unit, driven = tile[0], tile[1][..., :1], tile[2]
        currents.append(torch.bmm(cells, driven.mT) / unit.clamp(min=TINY))
        powers.append(unit.square() * weights)
    noise = relative_read_noise(config.device, layer.pairs)
    largest = max(float(current.abs().max()) for current in currents) + 3 * noise
    levels, candidates = converter_levels(config.adc_bits), [largest * share for share in FULL_SCALES]
    if not levels or not largest:
        return candidates[0]
    errors = sum(conversion_errors(c, power, candidates, levels, noise) for c, power in zip(currents, powers))
    return candidates[int(errors.argmin())]  # type: ignore[union-attr]
