"""From weights to conductances: the choice of w_scale, the weight that a cell at g_max stands for.

The retention noise of a weight grows with w_scale, so letting the largest weights saturate at g_max costs little and
quiets all others. What is best is in closed form: clipping error + retention error of the output.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.moments import WeightError
from .layer import CrossbarLayer
from .ops.cpu import ELEMENTS
from .ops.functions import WeightVariance
from .ops.reference import clip, quantize, weight_mean

# Candidates for weight_clip="auto", in RMS of the channel; beyond comes no clipping at all.
CLIPS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)

# How much the power of a convolution's systematic error, of clipping and mean shift, counts against that of spread and
# read noise, as `systematic` below: it is the same at every pixel and on every chip, so it does not average out, while
# spread is another from cell to cell, and read noise from read to read. A layer's plain error may so be up to twice the
# least there is. Measured without finetuning, hfox-neurram after 1 day, 6 chips: MobileNetV3 on CIFAR-10 (digital 61.6)
# 46.0, 54.1, 55.5 for 1, 4, 16; ResNet18 (65.2) 64.0, 64.3, 64.3, 64.1 for 1, 4, 8, 16. With more read noise than
# spread, 12 chips: four convolutions on scikit-learn's digits (98.7) 39.9, 57.0, 56.6, 55.5 for 1, 4, 8, 16 at 3 µA;
# separable ones (98.0) 58.2, 71.4, 70.0, 68.8 at 0.5 µA. Where read noise counts 8 times too: 41.3 and 65.0.
CONVOLUTION = 8.0

# The same of tokens, at most: clipping takes from the weights that matter most, alike in all tokens, and over layers
# in a row such errors add up in amplitude, those of independent cells in power. It counts as the root of the number of
# layers, up to this. Measured without finetuning for 1, 2 and 4: SmolLM2-135M, each token with its own input range,
# perplexity over digital, cmo-hfox-ibm, 3 chips, centered: ideal 1.07, 1.00, 1.00, after ten years 1.35, 1.26, 1.31
# (16: 1.35; unclipped 1.36), not centered 1.31, 1.22, 1.27; hfox-neurram, 2 chips: ideal 2.1, 1.15, 1.09, after a day
# above 10, 7.3, 9.1 (16: 14). MiniLM on SQuAD (F1, digital 58.7), hfox-neurram, 5 chips, 1 and 4: ideal 54.8, 58.2,
# after a day 52.2, 52.8.
TOKENS = 2.0


# Bins of a channel's weights by magnitude: so many to a factor of two, up to LARGEST times their RMS.
PER_OCTAVE, LARGEST, BINS = 16, 32.0, 192


class Inputs(NamedTuple):
    """Samples of what meets an array, scaled by the root of :func:`relative_weights` where a relative error is meant.

    Attributes:
        phi: (groups, samples, crossbar rows). offset: what was subtracted before and is added digitally, through the
            weights as they are held, so that clipping acts on it too; broadcastable to phi, None where there is none.
        read_noise: the power of the read noise at a column's output where w_scale is 1.
        copies: of each crossbar row, (groups, 1, crossbar rows), which divide the power of its spread; or None.
    """

    phi: Tensor
    offset: Tensor | None = None
    read_noise: float = 0.0
    copies: Tensor | None = None

    def split(self, rows: int) -> "list[Inputs]":
        """Tile by tile."""
        offset = None if self.offset is None else self.offset.expand(self.phi.shape)
        parts = [[None] * self.phi.shape[2] if t is None else t.split(rows, 2) for t in (offset, self.copies)]
        return [Inputs(x, o, self.read_noise, k) for x, o, k in zip(self.phi.split(rows, 2), *parts)]

    def power(self) -> Tensor:
        """What the variance of a row's weights is multiplied by in the output's, (groups, 1, crossbar rows)."""
        power = self.phi.square().mean(1)[:, None]
        return power if self.copies is None else power / self.copies


class Magnitudes(NamedTuple):
    """Each channel's weights in bins of magnitude, which a spread depends on alone: a few bins in place of all weights,
    for one candidate of a scale after the other.

    Attributes:
        size: the mean magnitude in each, (groups, channels, bins). power: the number of weights in each, or the sum of
            the powers of their inputs.
    """

    size: Tensor
    power: Tensor

    @classmethod
    def of(cls, rows: Tensor, rms: Tensor, power: Tensor | None = None) -> "Magnitudes":
        """Those of weights (groups, channels, crossbar rows), by channels' RMS and the power of each row's input."""
        size, empty = rows.abs(), rows.new_zeros(*rows.shape[:2], BINS)
        place = (size / (LARGEST * rms).clamp(min=1e-30)).log2_().mul_(PER_OCTAVE).add_(BINS)
        place = place.nan_to_num_(0.0, BINS, 0.0).clamp_(0, BINS - 1).long()
        count = empty.scatter_add(2, place, torch.ones_like(size))
        mean = empty.scatter_add(2, place, size) / count.clamp(min=1)
        return cls(mean, count if power is None else empty.scatter_add(2, place, power.expand(size.shape)))


def weight_scales(
    rows: Tensor,
    clip: float | str | None,
    per_channel: bool,
    error: WeightError,
    inputs: Inputs | None = None,
    tile: int | None = None,
    systematic: float = 1.0,
) -> Tensor:
    """w_scale for each output channel, ``min(max|W|, clip · RMS)``.

    Args:
        rows: weights, (groups, channels of a group, crossbar rows).
        clip: RMS multiples, None for no clipping, or "auto".
        per_channel: one scale a channel, else one for all.
        error: moments of the retention error, for "auto".
        inputs: samples of them; None takes white inputs.
        tile: crossbar rows of a tile, where each tile has scales of its own.
        systematic: see :func:`expected_error`.

    Returns:
        (groups · channels,) or (1,), or with ``tile`` (groups · channels, tiles), float32; 0 for an all-zero channel.
    """
    rows = rows.detach().float()
    if tile is not None:
        parts = zip(rows.split(tile, 2), [None] * rows.shape[2] if inputs is None else inputs.split(tile))
        return torch.stack([weight_scales(w, clip, per_channel, error, x, systematic=systematic) for w, x in parts], 1)
    dims = (2,) if per_channel else (0, 1, 2)
    largest = rows.abs().amax(dims, keepdim=True)
    if clip is None:
        return largest.reshape(-1)
    rms = rows.square().mean(dims, keepdim=True).sqrt()
    if isinstance(clip, str):
        step = max(rows.shape[1], 1)
        if per_channel and rows.device.type == "cpu":  # channels that fit in the cache together: 7 times as fast
            step = max(1, ELEMENTS * step // max(rows.numel(), 1))
        pieces = zip(rows.split(step, 1), largest.split(step, 1), rms.split(step, 1))
        best = torch.cat([least_error_scales(w, top, r, error, inputs, systematic) for w, top, r in pieces], 1)
    else:
        best = torch.minimum(largest, clip * rms)
    return best.reshape(-1)


def layer_scales(
    layer: CrossbarLayer,
    rows: Tensor,
    clip: float | str | None,
    inputs: Inputs | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """:func:`weight_scales` as the layer's config shares them, of the shape of its ``weight_scale``.

    Args:
        rows: what the cells of each weight are to hold together, (groups, channels of a group, crossbar rows).
        clip: see there. inputs: samples of what meets each row.
        copies: of each row, broadcastable to (groups, 1, crossbar rows); None: the layer's.
    """
    sharing = layer.crossbar.config.weight_scale
    tile = layer.tile_rows() if sharing == "per_tile" else None
    systematic = CONVOLUTION if layer.reads_windows else min(TOKENS, math.sqrt(max(len(layer.crossbar.names), 1)))
    if copies is None and layer.copied:
        copies = layer.copies_of_rows()
    if copies is not None:  # each of a row's copies holds its share, and gets as much as the others
        rows = rows / copies
        if inputs is not None:
            offset = None if inputs.offset is None else inputs.offset * copies
            inputs = Inputs(inputs.phi * copies, offset, inputs.read_noise, copies)
    if inputs is not None and tile is None:  # each tile adds its own
        inputs = inputs._replace(read_noise=inputs.read_noise * layer.tiles())
    return weight_scales(rows, clip, sharing != "per_tensor", layer.error, inputs, tile, systematic)


def least_error_scales(
    rows: Tensor, largest: Tensor, rms: Tensor, error: WeightError, inputs: Inputs | None, systematic: float = 1.0
) -> Tensor:
    """Of :data:`CLIPS`, the scale with the least :func:`expected_error`, for each element of ``largest``: every second
    of them first, then the best one's neighbours. What a smaller scale cuts off grows and what it quiets falls, so that
    10 of 15 errors find the least one, but for 1 in 20 channels, whose error is then the next best.
    """
    multiples = torch.tensor([torch.finfo(torch.float32).max, *reversed(CLIPS)], dtype=rows.dtype, device=rows.device)
    place = torch.zeros(largest.shape, dtype=torch.long, device=rows.device)
    best, least = largest, torch.full_like(largest, math.inf)
    sizes = None
    if rows.shape[2] > BINS and not error.levels:  # which would have to be of the bins, too
        sizes = Magnitudes.of(rows, rms, None if inputs is None else inputs.power())

    def compare(candidate: Tensor) -> None:
        nonlocal place, best, least
        candidate = candidate.clamp(0, len(CLIPS))
        scale = torch.minimum(largest, multiples[candidate] * rms)
        cost = expected_error(rows, scale, error, inputs, systematic, sizes)
        cost = cost if largest.numel() > 1 else cost.sum().reshape(1, 1, 1)
        place, best = torch.where(cost < least, candidate, place), torch.where(cost < least, scale, best)
        least = torch.minimum(cost, least)

    for every_second in range(0, len(multiples), 2):
        compare(torch.full_like(place, every_second))
    middle = place
    compare(middle - 1)
    compare(middle + 1)
    return best


def relative_weights(rows: Tensor, inputs: Tensor) -> Tensor:
    """``1 / |W phi_n|²`` of each sampled input, (samples,): what makes an output error a relative one.

    A few tokens drive a layer far beyond the rest ([CLS], [SEP], massive activations). The normalization that follows
    takes that out again, so an absolute error would let them decide for all: on MiniLM and hfox-neurram after one day
    weights clipped for the least absolute error give 44.6 F1, for the least relative one 51.0 (digital 56.7).

    Args:
        rows: (groups, channels of a group, crossbar rows). inputs: (groups, samples, crossbar rows).
    """
    signal = torch.bmm(rows.detach().float(), inputs.transpose(1, 2)).square().sum((0, 1))
    return 1 / (signal + 1e-3 * signal.mean()).clamp(min=1e-30)  # an output near zero is not all that counts


def expected_error(
    rows: Tensor,
    scale: Tensor,
    error: WeightError,
    inputs: Inputs | None,
    systematic: float = 1.0,
    sizes: Magnitudes | None = None,
) -> Tensor:
    """``E|W (phi + o) - W(t) phi - W_held o|²`` of each channel, (groups, channels, 1): clipping, mean shift, spread
    and read noise together.

    Clipping and mean shift act alike on all chips and are taken with the input's correlations, spread without, since
    it is independent from cell to cell.

    Args:
        systematic: how much the power of clipping and mean shift counts against that of spread and read noise.
        sizes: the weights and the powers of their inputs in bins, for what needs no more; None: all by themselves.
    """
    power = rows.new_ones(()) if inputs is None else inputs.power()
    size, power = (rows, power.to(rows)) if sizes is None else sizes
    rows = size if inputs is None else rows
    wide = scale.expand(rows.shape)
    held = _held(rows, wide, error)
    total = torch.zeros(*rows.shape[:2], 1, dtype=rows.dtype, device=rows.device)
    clipped: Any = held - rows
    if inputs is not None:
        clipped = torch.bmm(clipped, (inputs.phi if inputs.offset is None else inputs.phi + inputs.offset).mT)
    for mean in error.means:
        shift = clipped
        if not mean.is_zero:
            shifted = weight_mean(held, wide, mean.table(held))
            shift = shift + (shifted if inputs is None else torch.bmm(shifted, inputs.phi.mT))
        square = shift.square()
        total += (square * power).sum(2, keepdim=True) if inputs is None else square.mean(2, keepdim=True)
    total *= systematic / len(error.means)
    if sizes is not None:
        wide = scale.expand(size.shape)
        held = _held(size, wide, error)
    spread = WeightVariance.apply(held, wide, error.spread(held))
    total += (spread * power).sum(2, keepdim=True)
    return total if inputs is None else total + scale.square().amax(2, keepdim=True) * inputs.read_noise


def _held(rows: Tensor, scale: Tensor, error: WeightError) -> Tensor:
    """What cells hold of weights: within their range, in steps where they have levels."""
    held = clip(rows, scale)
    return quantize(held, scale / (error.levels - 1), error.levels - 1, None) if error.levels else held
