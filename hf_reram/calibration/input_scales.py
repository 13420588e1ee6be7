"""What an input channel is shifted and divided by before it meets the array."""

import math
from typing import Any

import torch
from torch import Tensor

from ..config import ReRAMConfig, converter_levels
from ..device.read_noise import relative_read_noise
from ..nn import CrossbarLayer
from ..nn.mapping import layer_scales, relative_weights
from ..nn.ops.functions import WeightVariance

# Row for each input, while the copies of the last calibration are still there.
ONE = torch.ones((), dtype=torch.float32, device="cpu")

# Share of the input's power from which on an offset is subtracted.
WORTHWHILE = 0.1

# Up to which an input is no signal; the inverse of a smaller range could overflow.
TINY = 1e-30

# Candidates for the exponent of the input scales, the share of the error that they may leave at most, and a bound.
POWERS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
GAINED = 0.9
TYPICAL_CLIP = 3.0  # RMS, in place of "auto" while the scales are chosen
LARGEST_SCALE = 30.0


def typical_clip(config: ReRAMConfig) -> Any:
    """weight_clip, or what stands for "auto" while it is not chosen yet."""
    return TYPICAL_CLIP if config.weight_clip == "auto" else config.weight_clip


def input_offset(mean: Tensor, power: Tensor) -> Tensor:
    """The mean of each input channel, or zeros where leaving them out takes less than :data:`WORTHWHILE` off the power,
    as a whole and averaged over channels (those of a depthwise convolution do not mix).

    Args:
        mean, power: E x and E x² of each channel, (channels,).
    """
    share = mean.square() / power.clamp(min=1e-30)
    whole = mean.square().sum() / power.sum().clamp(min=1e-30)
    worthwhile = max(float(whole), float(share.mean())) > WORTHWHILE
    return mean.float() if worthwhile else torch.zeros_like(mean, dtype=torch.float32)


def input_scale(x: Tensor, layer: CrossbarLayer) -> Tensor:
    """Scales of the input channels, (rms of the input / rms of the weights)^p, with the p of the least expected output
    error (spread of retention, read noise and DAC step); ones where that leaves more than :data:`GAINED` of the error.

    Args:
        x: centered, as the layer reads it.
    """
    config = layer.crossbar.config
    rows = layer.to_rows(layer.weight.detach()).float()
    groups, columns, width = rows.shape
    power, largest, importance = _channel_power(x, layer, rows)
    of_weights = rows.square().mean(1).view(groups, -1, width * groups // len(power)).mean(2)
    ratio = (power.view(groups, -1) / of_weights.clamp(min=TINY)).clamp(min=TINY).sqrt()
    ratio = (ratio / ratio.log().median().exp()).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    current = relative_read_noise(config.device, layer.pairs)
    levels, error = converter_levels(config.dac_bits), layer.error
    clip = typical_clip(config)
    best, least = torch.ones_like(ratio), math.inf
    for exponent in POWERS:
        scale = ratio**exponent
        along = scale.repeat_interleave(width * groups // len(power), 1)[:, None]
        cells = rows * along
        held = layer_scales(layer, cells, clip, copies=ONE)
        spread = WeightVariance.apply(cells, layer.along_rows(held).expand(cells.shape), error.spread(cells)).sum(1)
        spread = spread / along[:, 0].square()
        total = float((spread.view(groups, scale.shape[1], -1).sum(2) * power.view(groups, -1)).sum())
        noise = float(held.square().mean()) * groups * columns * layer.tiles() * current**2
        step = float(cells.square().sum()) / (12 * levels**2) if levels else 0.0
        total += importance * float((largest.view(groups, -1) / scale).max()) ** 2 * (noise + step)
        if total < least:
            best, least = scale, total * (1 if exponent else GAINED)
    return best.reshape(-1)


def _channel_power(x: Tensor, layer: CrossbarLayer, rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of each input channel the mean square, weighted as :func:`.ranges._sample_weights` says, and the largest
    magnitude; and the mean of the weights."""
    if layer.reads_windows:  # of every pixel: few of them may drive a channel at all
        flat = x.transpose(0, x.dim() + layer.channel_dim).flatten(1)
        return flat.square().mean(1), flat.abs().amax(1), 1.0
    tokens = x.reshape(-1, x.shape[-1])
    tokens = tokens[:: max(1, len(tokens) // 2048)]
    weights = relative_weights(rows, tokens[None])
    return (tokens.square() * weights[:, None]).mean(0), tokens.abs().amax(0), float(weights.mean())
