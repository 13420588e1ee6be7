"""What the cells hold: the weights as they were programmed, as the device's error leaves them in training, or a
chip's."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..device.moments import white_error
from .ops.functions import DriftedWeight, WeightVariance, clip_weight
from .scalars import Scalars

if TYPE_CHECKING:
    from .layer import CrossbarLayer


class Held(NamedTuple):
    """What a forward reads.

    Attributes:
        weight: V as the cells hold it now, of the weight's shape. programmed: V as it was programmed.
        bias: what is added digitally, the layer's bias and W o, (output channels,), or None.
    """

    weight: Tensor
    programmed: Tensor
    bias: Tensor | None


class Chip(NamedTuple):
    """A layer's cells on a chip: ``weight`` as they are found, of the weight's shape; ``offset``, W o of what was
    programmed, (output channels,), None where the layer is not centered."""

    weight: Tensor
    offset: Tensor | None


def hold(layer: "CrossbarLayer", now: Scalars) -> Held:
    """The cells of this forward."""
    if layer.chips:
        return deployed(layer, now)
    if layer.training and layer.crossbar.current().sampling is not None:
        return sampled(layer, now)
    return ideal(layer, now)


def ideal(layer: "CrossbarLayer", now: Scalars) -> Held:
    """The weights as they were programmed."""
    programmed = program(layer, layer.weight)
    return Held(programmed, programmed, digital_bias(layer, programmed, now))


def sampled(layer: "CrossbarLayer", now: Scalars) -> Held:
    """``V + m(V) + s(V) ε``: a draw of the device's retention error, or white noise of its power."""
    programmed, sampling = program(layer, layer.weight), layer.crossbar.current().sampling
    assert sampling is not None
    drifts = sampling.kind == "drift"
    error = sampling.error.averaged(now.pairs) if drifts else white_error(layer.white_noise_std())
    weight = wide(programmed)
    noise = sampling.normal(weight, layer.crossbar_name)
    drifted = DriftedWeight.apply(weight, layer.held_scale(weight.dtype), noise, error)
    return Held(drifted.to(programmed.dtype), programmed, digital_bias(layer, programmed, now))


def deployed(layer: "CrossbarLayer", now: Scalars) -> Held:
    """A chip's cells as they are found."""
    chip = layer.chip
    assert chip is not None
    bias = layer.bias if chip.offset is None else chip.offset if layer.bias is None else layer.bias + chip.offset
    return Held(chip.weight, chip.weight, bias)


def cell_weight(layer: "CrossbarLayer", weight: Tensor) -> Tensor:
    """``V = W · a``, what the cells are to hold."""
    return weight * layer.along_inputs(layer.input_scale).to(weight.dtype) if layer.equalized else weight


def program(layer: "CrossbarLayer", weight: Tensor) -> Tensor:
    """``clamp(W · a, ±w_scale)``: what the cells can hold of a weight. The one place where weights are clipped."""
    return clip_weight(cell_weight(layer, weight), layer.held_scale())


def digital_bias(layer: "CrossbarLayer", programmed: Tensor, now: Scalars) -> Tensor | None:
    """The layer's bias and ``W o``, which make up for the input's offset."""
    if not now.centered:
        return layer.bias
    offset = offset_output(layer, programmed)
    return offset if layer.bias is None else layer.bias + offset


def offset_output(layer: "CrossbarLayer", programmed: Tensor) -> Tensor:
    """``W o = V (o / a)``, (output channels,), of weights as they were programmed."""
    rows = layer.to_rows(programmed)
    offset = layer.driven_offset().to(rows.dtype)
    if len(rows) == 1 and len(offset) == rows.shape[-1]:  # one row for each input channel
        return torch.mv(rows[0], offset)
    offset = offset.view(rows.shape[0], -1, 1)
    offset = offset.expand(-1, -1, rows.shape[2] // offset.shape[1]).reshape(rows.shape[0], -1, 1)
    return torch.bmm(rows, offset).view(-1)


@torch.no_grad()
def white_noise_std(layer: "CrossbarLayer") -> float:
    """Spread, in units of weight_scale, of white noise with the power of the device's retention error."""
    # In units of w_scale, so that the result is right where a whole channel is zero.
    ratio = wide(program(layer, layer.weight)) / layer.held_scale(torch.float32).clamp(min=1e-30)
    error = layer.error
    power = WeightVariance.apply(ratio, torch.ones_like(ratio[:1]), error)
    return math.sqrt(max(float(power.mean()) + error.mean_square, 0.0))


def wide(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision values would overflow or vanish."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
