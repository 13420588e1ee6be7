"""Numbers of calibration that follow the training, as batch norm's statistics do.

A layer is calibrated for the inputs and weights that it has before the training. A new head, or a small model at a high
learning rate, leaves these within a few steps: inputs beyond the range are clamped and get no gradient, and weights
cannot grow out of what their cells hold. So training forwards look at some of each layer's inputs
(:mod:`hf_reram.nn.observe`), and after the optimizer's step input range, offset, gain, the ADC's range and weight scale
move towards what was seen. Looks are many at first and rare later.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.input_scales import TINY, TYPICAL_CLIP
from ..device.iv import LINEAR_B
from ..model.find import crossbar_states, is_compiled, patched_layers
from ..model.sharding import processes
from ..nn import CrossbarLayer
from ..nn.array import cell_weight
from ..nn.observe import FULL_SCALES, Following, Seen
from ..nn.places import is_trained
from ..nn.scalars import SMALLEST_RANGE
from ..nn.state import CrossbarState
from ..nn.tensors import whole
from .learned import is_learned, set_range

logger = logging.get_logger(__name__)

# Share of the way to what was seen that numbers take at once, and how far beyond the range an input takes it there.
MOMENTUM = 0.2
JUMP = 1.25

# Share of the inputs that a learned range may leave out, where the percentile leaves out fewer: the optimizer's choice.
LEFT_OUT = 0.01

# By how much the error of another full scale of the ADC has to be less: what is looked at is only a sample.
NOTABLE = 1.1

# Every step is looked at until this one, then every second, and half as many with each doubling of the steps done.
ALL_UNTIL = 16
LONGEST = 64


def is_due(step: int) -> bool:
    """Whether the forwards before optimizer step number ``step``, from 0, are looked at."""
    every = 1
    while every < LONGEST and step >= ALL_UNTIL * every:
        every *= 2
    return step % every == 0


@torch.no_grad()
def follow_training(model: nn.Module) -> None:
    """Let the numbers of calibration follow a training: to be called before the first step and after each step of the
    optimizer, before :func:`hf_reram.hold_weights`, by all processes. :class:`hf_reram.ReRAMTrainer` does so itself.
    The last steps are best done without, so that the weights settle.

    Layers whose weights are not trained, as beside adapters, keep their numbers, and are only looked at where their
    inputs come from something that is trained. Learned input ranges are left to the optimizer, but moved out where they
    cut more than a hundredth of the inputs off, and more than ``input_percentile`` does.

    Of a model under ``torch.compile`` the forwards that look run without it, within :func:`hf_reram.sampled_drift`: in
    the first sixteen steps and in few of the later ones. Those outside of it do not look, which a warning says.

    Raises:
        ValueError: the model is not patched.
    """
    states, layers = crossbar_states(model), patched_layers(model)
    if states[0].following is None:
        begin_following(model)
        return
    following: Any = states[0].following
    if is_due(following.steps):
        _warn_blind(states)
        _follow_inputs(layers)
        for layer in layers.values():
            if is_trained(layer) and not following.settled:
                _follow_weights(layer)
    for state in states:
        following = state.following
        following.seen.clear()
        following.conversions.clear()
        following.steps += 1
        following.looks = is_due(following.steps)


@torch.no_grad()
def begin_following(model: nn.Module, steps: int = 0, settled: bool = False) -> None:
    """Begin, or begin anew from the weights as they are, after ``steps`` steps of the optimizer; ``settled``: only
    look, for :func:`clamped_shares`, which go on knowing what was seen before."""
    compiled = is_compiled(model)
    for state in crossbar_states(model):
        state.compiled |= compiled
        before = state.following or Following()
        state.following = Following(
            steps, is_due(steps), settled, clamped=before.clamped, clamped_before=before.clamped_before
        )
    for layer in patched_layers(model).values():
        following: Any = layer.crossbar.following
        if is_trained(layer):
            following.rms[layer.crossbar_name] = _weight_rms(layer)


def stop_following(model: nn.Module) -> None:
    """Leave the numbers of calibration as they are now, and look at inputs no more."""
    for state in crossbar_states(model):
        state.following = None


def clamped_shares(model: nn.Module, twice: bool = False) -> dict[str, Tensor]:
    """The share of each layer's inputs that lay beyond its range when it was last looked at, by layer name; NaN
    where not all of them were finite. ``twice``: the smaller one of the last two looks, since one may be of a strange
    batch; 0 where there was one look alone."""
    found = {}
    for name, layer in patched_layers(model).items():
        following = layer.crossbar.following
        if following is not None and layer.crossbar_name in following.clamped:
            found[name] = following.clamped[layer.crossbar_name]
            if twice:
                before = following.clamped_before.get(layer.crossbar_name)
                found[name] = found[name].new_zeros(()) if before is None else found[name].fmin(before)
    return found


def _warn_blind(states: list[CrossbarState]) -> None:
    """Say once that compiled forwards were to look; that of the first step does not know yet that it is compiled."""
    for state in states:
        following: Any = state.following
        if state.forward.compiled and following.looks and following.steps > 0 and "compiled" not in state.warned:
            state.warned.add("compiled")
            logger.warning(
                "the training runs under torch.compile, whose code does not look at inputs, so that input ranges do "
                "not follow it: run its forwards inside hf_reram.sampled_drift(model), in code that is not compiled "
                "itself, where those that look run without torch.compile"
            )


def _follow_inputs(layers: dict[str, Any]) -> None:
    seen = {name: layer.crossbar.following.seen.get(layer.crossbar_name) for name, layer in layers.items()}
    errors = {name: layer.crossbar.following.conversions.get(layer.crossbar_name) for name, layer in layers.items()}
    if layers and processes() > 1:
        _exchange(layers, seen, errors)
    for name, layer in layers.items():
        if (found := seen[name]) is not None:
            _follow_input(layer, found)
        following = layer.crossbar.following
        if (of_scales := errors[name]) is not None and not following.settled:
            shares = torch.tensor(FULL_SCALES, dtype=torch.float64, device=of_scales.device)
            of_others = of_scales * torch.where(shares == 1, 1.0, NOTABLE)  # also where nothing was seen
            share = torch.where(of_scales.sum() > 0, shares[of_others.argmin()], 1.0).to(layer.adc_range)
            layer.adc_range.copy_(_moved(layer.adc_range, layer.adc_range * share, share == FULL_SCALES[-1]))


def _exchange(layers: dict[str, Any], seen: dict[str, Any], errors: dict[str, Any]) -> None:
    """What all processes have seen, of layers that some of them did not call too."""
    scales = len(FULL_SCALES)
    sizes = [5 + layer.inputs for layer in layers.values()]
    device = next(iter(layers.values())).weight.device
    sums = torch.cat(
        [
            torch.zeros(size, dtype=torch.float64, device=device) if s is None else s.sums.to(device)
            for s, size in zip(seen.values(), sizes)
        ]
        + [torch.zeros(scales, dtype=torch.float64, device=device) if e is None else e for e in errors.values()]
    )
    largest = torch.full((len(layers), 2), -math.inf, dtype=torch.float32, device=device)
    for row, s in zip(largest, seen.values()):
        if s is not None:
            row.copy_(s.largest)
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    parts = sums.split([*sizes, *[scales] * len(layers)])
    for name, part, of_scales, row in zip(layers, parts, parts[len(layers) :], largest):
        seen[name] = Seen(part, row) if part[0] > 0 else None
        errors[name] = of_scales if of_scales.any() else None


def _follow_input(layer: CrossbarLayer, seen: Seen) -> None:
    now, config, name = layer.scalars(), layer.crossbar.config, layer.crossbar_name
    (top, lowest), sums = seen.largest.unbind(), seen.sums
    beyond = (sums[3] / sums[4]).float()
    looked = sums[0] > 0  # at something that was finite, and no padding
    following: Any = layer.crossbar.following
    if (before_that := following.clamped.get(name)) is not None:
        following.clamped_before[name] = before_that
    following.clamped[name] = torch.where(looked, beyond, following.clamped.get(name, math.nan))
    if following.settled or not is_trained(layer):
        return
    if now.centered:
        mean = (sums[5:] / sums[0].clamp(min=TINY)).float()
        layer.input_offset.copy_(_moved(layer.input_offset, torch.where(looked, mean, layer.input_offset)))
    before = whole(layer.input_range.detach()).clamp(min=SMALLEST_RANGE)
    span = torch.where(looked & (top > TINY), _moved(before, top, top > JUMP * before), before)
    if is_learned(layer):
        much = beyond > max(LEFT_OUT, 1 - config.input_percentile / 100)
        span = torch.where(much, torch.maximum(before, span), before)
        set_range(layer, span)
    elif now.per_token or isinstance(layer.input_range, nn.Parameter):
        span = before
    else:
        layer.input_range.copy_(span)
    if config.dac_bits:
        below = -layer.input_floor * before
        below = torch.where(looked, _moved(below, lowest, lowest > below), below)
        layer.input_floor.copy_(-(below / span).clamp(0, 1))
    if config.gain == "calibrated" and now.b >= LINEAR_B:
        gain = (now.b * sums[1] / sums[2].clamp(min=TINY)).float()
        layer.gain.copy_(torch.where(sums[2] > TINY, _moved(layer.gain, gain), layer.gain))


def _moved(number: Tensor, target: Tensor, at_once: Any = False) -> Tensor:
    """A number on its way to what was seen."""
    moved = number.lerp(target.expand_as(number), MOMENTUM)
    return moved if at_once is False else torch.where(at_once, target, moved)


def _follow_weights(layer: CrossbarLayer) -> None:
    """The scale grows and shrinks with the weights, so that as many of them as before are clipped."""
    following: Any = layer.crossbar.following
    before, rms = following.rms.get(layer.crossbar_name), _weight_rms(layer)
    if before is None:
        following.rms[layer.crossbar_name] = rms
        return
    scale = torch.where(before <= TINY, TYPICAL_CLIP * rms, layer.weight_scale * (rms / before.clamp(min=TINY)))
    finite = torch.isfinite(rms) & torch.isfinite(scale)  # else of weights that are put back, or lost anyway
    layer.weight_scale.copy_(torch.where(finite, scale, layer.weight_scale))
    following.rms[layer.crossbar_name] = torch.where(finite, rms, before)


def _weight_rms(layer: Any) -> Tensor:
    """Root mean square of the weights that share a scale, of weight_scale's shape."""
    weight = whole(layer.weight.detach())  # also where FSDP2 has sharded it
    rows, sharing = layer.to_rows(cell_weight(layer, weight)).float(), layer.crossbar.config.weight_scale
    rows = rows / layer.copies_of_rows() if layer.copied else rows
    if sharing == "per_tensor":
        return rows.square().mean().sqrt().reshape(1)
    if sharing == "per_channel":
        return rows.square().mean(2).sqrt().reshape(-1)
    return torch.stack([part.square().mean(2).sqrt().reshape(-1) for part in rows.split(layer.tile_rows(), 2)], 1)
