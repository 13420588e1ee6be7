"""What a layer's retention error costs: closed-form terms of its forward, which join the loss.

Each is a pair (noise, signal) of sums over the batch, so that the loss is their ratio over all processes' batches
together.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device.moments import WeightError
from .array import Held, wide
from .attach import Attach
from .drive import Driven, row_power
from .forward import add_term, runs_again
from .ops.functions import OutputPower, WeightVariance
from .ops.reference import total_power, weight_mean
from .readout import readout_errors
from .untrained import refuse_training

if TYPE_CHECKING:
    from .layer import CrossbarLayer


def account(layer: "CrossbarLayer", driven: Driven, held: Held, y: Tensor) -> Tensor:
    """The output, to which in training the layer's retention term is attached; of a chip, a refusal to be trained."""
    state = layer.crossbar
    if layer.chip is not None and layer.training and torch.is_grad_enabled():
        return refuse_training(y, layer.weight)
    if layer.chip is not None or not layer.training or not (state.term or state.measures):
        return y
    name = layer.crossbar_name
    forward = state.current(name)
    with torch.autocast(y.device.type, enabled=False):
        if state.measures and state.term != "output" and not runs_again():
            with torch.no_grad():
                power = _power(layer, y, held.bias, driven.keep)[1]
                add_term(forward.ratios, name, output_term(layer, driven, held, power))
                for source, term in source_terms(layer, driven, held, y, power).items():
                    add_term(forward.sources.setdefault(source, {}), name, term)
        if state.term is None:
            return y
        signal: Any = None
        if state.physics.term_reads_output:
            y, signal = _power(layer, y, held.bias, driven.keep)
        if state.term == "sensitivity":
            # Of a layer that is called several times the divergences add up, of the same examples.
            term = sensitivity_term(layer, driven, held, 0 if name in forward.terms else forward.batch_size)
        elif state.term == "weight":
            term = weight_term(layer, held)
        else:
            term = output_term(layer, driven, held, signal)
        if not runs_again():
            add_term(forward.terms, name, term)
        forward.attached = not torch.compiler.is_compiling()
        if not forward.attached:
            return y
        forward.rerun |= forward.grad and not torch.is_grad_enabled()
        y = Attach.apply(y, term, forward.scale(name, y.device))
        if forward.alone and not runs_again():
            forward.keep_while(y)
        if layer.copies_output is False:
            return y
        return forward.give(layer, y) if layer.copies_output is None and not runs_again() else y.clone()


def source_terms(layer: "CrossbarLayer", driven: Driven, held: Held, y: Tensor, signal: Tensor) -> dict[str, Tensor]:
    """:func:`output_term` of each source of error alone, of those that the state wants to know of, and of the
    read-out."""
    wanted = layer.crossbar.sources
    if wanted is None:
        return {}
    found = {
        source: output_term(layer, driven, held, signal, error.averaged(layer.pairs))
        for source, error in wanted.items()
    }
    for source, power in readout_errors(layer, driven, held, y, layer.scalars()).items():
        found[source] = torch.stack((power.to(signal.dtype), signal.reshape(())))
    return found


def output_term(
    layer: "CrossbarLayer", driven: Driven, held: Held, signal: Tensor, error: WeightError | None = None
) -> Tensor:
    """``(E|ΔW phi|², E|W phi|²)``, with the second given: their ratio is the layer's noise-to-signal ratio. ``error``:
    None for all of the layer's."""
    error = layer.error if error is None else error
    own = held if error is layer.error else held._replace(variance=None)  # which came with sampled drift
    columns = layer.to_rows(_variance(layer, own, error)).sum(1)
    noise = (columns * row_power(layer, driven)).sum()
    if error.mean_is_linear:  # proportional to W, so that it needs no product of its own
        noise = noise + error.mean_square * signal if error.mean_square else noise
    else:
        noise = noise + _mean_power(layer, driven, held, error)
    return torch.stack((noise.reshape(()), signal.reshape(())))


def weight_term(layer: "CrossbarLayer", held: Held) -> Tensor:
    """``(E|ΔW|², |W|²)``: the same without activations, of the weights by themselves, not times the input scales."""
    error, programmed = layer.error, wide(held.programmed)
    share = 1 / layer.along_inputs(layer.input_scale).to(programmed.dtype) if layer.equalized else 1.0
    noise = (_variance(layer, held, error) * share**2).sum()
    for mean in error.shifts:
        shift = weight_mean(programmed, layer.held_scale(programmed.dtype), mean.table(programmed))
        noise = noise + (shift * share).square().sum() / len(error.means)
    return torch.stack((noise, (programmed * share).square().sum()))


def sensitivity_term(layer: "CrossbarLayer", driven: Driven, held: Held, examples: Any) -> Tensor:
    """``(½ Σ_i h_i Σ_n |Δy_i|², examples)``, spread and mean shift times their coherence: their ratio is, to second
    order, the KL divergence [nats] per example that the retention error of this layer causes in the model's prediction,
    of all layers together their sum, with ``h_i`` the Fisher information of output channel i. It and the coherence are
    those of weights and inputs when they were measured (:mod:`hf_reram.calibration.sensitivity`).

    Raises:
        RuntimeError: the layer's Fisher information was never measured.
    """
    if layer.sensitivity is None:
        raise RuntimeError(
            f"layer {layer.crossbar_name!r} has no sensitivity: call calibrate(model, batches, sensitivity=True) "
            'before training with retention_loss="sensitivity"'
        )
    error = layer.error
    variance = layer.to_rows(_variance(layer, held, error))
    h = layer.sensitivity.to(variance.device).reshape(variance.shape[:2])
    of_spread, of_shift = layer.coherence
    noise = (h * torch.einsum("gor,gr->go", variance, row_power(layer, driven))).sum() * of_spread
    if error.shifts:
        noise = noise + _mean_power(layer, driven, held, error, h.reshape(-1).sqrt()) * of_shift
    noise = noise.reshape(())
    count = examples.to(noise) if isinstance(examples, Tensor) else torch.full_like(noise, float(examples))
    return torch.stack((0.5 * noise, count))


def _variance(layer: "CrossbarLayer", held: Held, error: WeightError) -> Tensor:
    """s² of each weight."""
    return variance(layer, wide(held.programmed), error) if held.variance is None else held.variance


def variance(layer: "CrossbarLayer", programmed: Tensor, error: WeightError) -> Tensor:
    """s² of each of a layer's weights, which its cells hold as ``programmed``, at least in float32."""
    spread = WeightVariance.apply(programmed, layer.held_scale(programmed.dtype), error.spread(programmed))
    return layer.averaged(spread)


def _power(layer: "CrossbarLayer", y: Tensor, bias: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """y, and ``Σ_n |y_n - bias|²``."""
    rows, power = OutputPower.apply(layer.examples(y), None if bias is None else layer.over_channels(bias), keep)
    return rows.view(y.shape), power


def _mean_power(
    layer: "CrossbarLayer", driven: Driven, held: Held, error: WeightError, weights: Tensor | None = None
) -> Tensor:
    """``Σ_n |m phi_n|²``, averaged over the times; output channels times ``weights`` before they are squared."""
    programmed, s = wide(held.programmed), wide(driven.s)
    scale = layer.held_scale(programmed.dtype)
    powers: list[Any] = []
    for mean in error.shifts:
        shifted = weight_mean(programmed, scale, mean.table(programmed))
        product = layer.multiply(s, shifted, None, driven.padded)
        product = product if weights is None else product * layer.over_channels(weights).to(product.dtype)
        powers.append(total_power(layer.examples(product), None, driven.keep))
    return torch.stack(powers).sum(0) / len(error.means)
