"""Choose what arrays hold and how they are read: weight scales and ADC ranges."""

import torch
from torch import Tensor

from ..device.read_noise import relative_read_noise
from ..model.find import arrays
from ..model.sharding import gathered
from ..nn.array import cell_weight, program
from ..nn.mapping import Inputs, layer_scales, relative_weights
from .ranges import best_full_scale, curve_of, largest_tokens, sample_weights
from .statistics import LayerStatistics


def by_array(statistics: dict[str, LayerStatistics]) -> list[list[LayerStatistics]]:
    """By the array that holds their weight."""
    layers = {name: found.layer for name, found in statistics.items()}
    return [[statistics[name] for name in same] for same in arrays(layers)]


def share_input_scales(statistics: dict[str, LayerStatistics], leaders: dict[str, str]) -> None:
    """One array holds one weight times one scale of its inputs: that of the first of the layers, which those that read
    the others' inputs get too."""
    for same in by_array(statistics):
        for found in same[1:]:
            leader = leaders.get(found.name)
            for name, other in statistics.items():
                if leader is not None and leaders.get(name) == leader:
                    other.scale = same[0].scale


def share_scales(held: list[list[LayerStatistics]]) -> None:
    """Give layers that share cells one weight scale."""
    for same in held:
        seen = [found for found in same if found.samples is not None]
        if len(seen) > 1:
            with gathered(found.layer for found in seen):
                settle_scale(seen)


def settle_scale(same: list[LayerStatistics]) -> None:
    """Give layers of one array the weight scale with the least expected error over the inputs of all of them, and each
    the full scale of its ADC."""
    layer = same[0].layer
    rows, several = weighted_inputs(same[0])[0], [weighted_inputs(found)[1] for found in same]
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
        found.layer.calibrated_outputs = None


# How many times the median token's largest magnitude that of a massive one is, at least. In SmolLM2-135M the first
# token of a text drives some down_proj 15 to 2,000 times as far as the others, and the model is lost without it; in
# MiniLM [CLS] and [SEP] drive layers 2 to 14 times as far, and to weigh these costs 9 points of F1 (recipes/README.md).
MASSIVE = 16.0


def weighted_inputs(statistics: LayerStatistics) -> tuple[Tensor, Inputs]:
    """The layer's weights by rows of the array, and what meets them, scaled by the root of :func:`sample_weights`.
    Where each token has a range of its own, the few that are :data:`MASSIVE` count as much together as all that were
    sampled: these hardly drive the rows of massive activations, whose large weights would be clipped at no cost."""
    layer, config = statistics.layer, statistics.layer.crossbar.config
    rows, phi, weights = _sampled(statistics)
    curve = curve_of(statistics)
    power = float((weights * curve.unit_square(config)).mean())
    massive = statistics.extremes[:, -1] > MASSIVE * statistics.peaks.median()
    if layer.scalars().per_token and massive.any():
        x, curve = largest_tokens(statistics, curve, massive)
        largest = curve.phi(x)
        own = relative_weights(rows, largest)
        power += float((own * curve.unit_square(config)).mean())
        several, few = len(weights), len(own)
        phi = torch.cat((phi, largest), 1)
        weights = torch.cat((weights, own * (several / few))) * (1 + few / several)  # the sum of two means, as one mean
    offset = (statistics.offset / statistics.scale).view(layer.groups, -1).repeat_interleave(layer.area, 1)
    factor = weights.sqrt()[:, None]
    read = power * relative_read_noise(config.device, layer.pairs) ** 2
    return rows, Inputs(phi * factor, offset[:, None] * factor, read)


def _sampled(statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's weights by rows of the array, phi of the sampled inputs, and how much each of them counts."""
    layer = statistics.layer
    rows = layer.to_rows(cell_weight(layer, layer.weight))
    phi = curve_of(statistics).phi(statistics.grouped_samples())
    return rows, phi, sample_weights(layer, rows, phi)


def _best_full_scale(statistics: LayerStatistics) -> float:
    layer = statistics.layer
    _, phi, weights = _sampled(statistics)
    held = layer.to_rows(program(layer, layer.weight)).float()
    scale = layer.along_rows(layer.weight_scale).expand(held.shape)
    return best_full_scale(layer, held, scale, phi, weights, curve_of(statistics))[0]
