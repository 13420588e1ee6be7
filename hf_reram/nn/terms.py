"""A layer's closed-form retention terms (DESIGN §2).

Each is a pair (noise, signal) of sums over the batch, so that the loss is their ratio over all processes' batches
together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import reference as compiled
from .ops.cells import WeightVariance, map_weight, weight_mean
from .ops.power import OutputPower, Pull, Tap


@dataclass
class Reading:
    """One forward of a layer, as its term sees it.

    Attributes:
        s: driven input; phi = factor · s, with a factor that is no number only where it is learned. y: output with its
            bias.
        bias: what was added to it digitally, (output channels,) or None.
        input_pull, output_pull: where powers of s and of y leave their gradients; None if they compute them.
        weight: what the cells hold before clipping; None: to be taken from the layer.
        variance: s² of the weights if it is already known.
    """

    s: Tensor
    y: Tensor
    factor: Tensor | float
    input_pull: Pull | None
    bias: Tensor | None
    output_pull: Pull | None = None
    weight: Tensor | None = None
    variance: Tensor | None = None


def wide(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision values would overflow or vanish."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def taps_output(layer) -> bool:
    """Whether the layer's term reads the power of its output, whose gradient then goes through a Tap."""
    state = layer.crossbar
    reads = state.term == "output" or (state.term == "sensitivity" and state.error.mean_square > 0)
    return layer.training and reads and not torch.compiler.is_compiling()


def tap_output(layer, reading: Reading) -> None:
    """Put a Tap on the output, which was computed with the bias detached."""
    reading.output_pull = Pull()
    rows = Tap.apply(layer._output_rows(reading.y), _bias(layer, reading), reading.output_pull)
    reading.y = rows.view(reading.y.shape)


def output_term(layer, reading: Reading) -> Tensor:
    """``(E|ΔW phi|², E|W phi|²)``: their ratio is the layer's noise-to-signal ratio."""
    error = layer.error
    columns = layer._rows(_variance(layer, reading)).sum(1)
    noise = (columns * layer._input_power(reading.s, reading.input_pull)).sum() * reading.factor**2
    signal = _output_power(layer, reading)
    if error.mean_is_linear:
        noise = noise + error.mean_square * signal if error.mean_square else noise
    else:
        noise = noise + _mean_power(layer, reading)
    return torch.stack((noise.reshape(()), signal.reshape(())))


def weight_term(layer, reading: Reading) -> Tensor:
    """``(E|ΔW|², |W|²)``: the same without activations."""
    scale, weight = wide(layer.held_scale()), _weight(layer, reading)
    held = map_weight(weight, scale)
    noise = _variance(layer, reading).sum()
    for mean in layer.error.means:
        if any(mean):
            noise = noise + weight_mean(weight, scale, mean).square().sum() / len(layer.error.means)
    return torch.stack((noise, held.square().sum()))


def sensitivity_term(layer, reading: Reading) -> Tensor:
    """``(½ Σ_i h_i Σ_n |Δy_i|², examples)``: their ratio is, to second order, the KL divergence [nats] per example
    that this layer's retention error causes in the model's prediction, with ``h_i`` the Fisher information of output
    channel i (:func:`hf_reram.calibration.sensitivity.measure_sensitivity`).

    Raises:
        RuntimeError: the layer's Fisher information was never measured.
    """
    if layer.sensitivity is None:
        raise RuntimeError(
            f"layer {layer.crossbar_name!r} has no sensitivity: call calibrate(model, batches, sensitivity=True) "
            'before training with retention_loss="sensitivity"'
        )
    error = layer.error
    variance = layer._rows(_variance(layer, reading))
    h = layer.sensitivity.to(variance.device).reshape(variance.shape[:2])
    power = layer._input_power(reading.s, reading.input_pull)
    noise = (h * torch.einsum("gor,gr->go", variance, power)).sum() * reading.factor**2
    if error.mean_square or not error.mean_is_linear:
        noise = noise + h.mean() * _mean_power(layer, reading)
    examples = torch.full_like(noise.reshape(()), float(layer.crossbar.batch_size))
    return torch.stack((0.5 * noise.reshape(()), examples))


TERMS = {"output": output_term, "weight": weight_term, "sensitivity": sensitivity_term}


def _variance(layer, reading: Reading) -> Tensor:
    if reading.variance is not None:
        return reading.variance
    variance = compiled.weight_variance if torch.compiler.is_compiling() else WeightVariance.apply
    return variance(_weight(layer, reading), wide(layer.held_scale()), layer.error)


def _weight(layer, reading: Reading) -> Tensor:
    return wide(layer.cell_weight() if reading.weight is None else reading.weight)


def _bias(layer, reading: Reading) -> Tensor | None:
    return None if reading.bias is None else wide(layer._broadcast(reading.bias, "output"))


def _output_power(layer, reading: Reading) -> Tensor:
    keep = layer.crossbar.keep(reading.s)
    return _power(layer._output_rows(reading.y), _bias(layer, reading), keep, reading.output_pull)


def _power(y: Tensor, bias: Tensor | None, keep: Tensor | None, pull: Pull | None) -> Tensor:
    if torch.compiler.is_compiling():
        return compiled.total_power(y, bias, keep)
    return OutputPower.apply(y, bias, keep, pull)


def _mean_power(layer, reading: Reading) -> Tensor:
    """``sum_n |m phi_n|²``, averaged over the times; m proportional to W needs no further product."""
    error = layer.error
    if error.mean_is_linear:
        return error.mean_square * _output_power(layer, reading)
    scale, s, keep = wide(layer.held_scale()), wide(reading.s), layer.crossbar.keep(reading.s)
    powers: list[Any] = []
    for mean in error.means:
        shifted = weight_mean(_weight(layer, reading), scale, mean) * reading.factor
        powers.append(_power(layer._output_rows(layer._op(s, shifted, None)), None, keep, None))
    return torch.stack(powers).mean(0)
