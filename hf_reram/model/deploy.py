"""A model as one chip: cells programmed once, then found as they are at a time and temperature."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..device.programming import program
from ..device.time import parse_time
from ..nn import CrossbarMixin
from ..nn.ops.cells import map_weight
from ..nn.state import layer_seed
from .find import crossbar_layers, crossbar_state
from .inputs import evaluating


@contextmanager
def deploy(
    model: nn.Module, time: str | float | None = None, temperature: float | None = None, seed: int = 0
) -> Iterator[nn.Module]:
    """The model as chip number ``seed``, ``time`` after programming, for as long as the context lasts.

    Every cell draws its programming error and its retention variate once per seed, so the same seed is the same chip at
    every time and it ages along one curve. Read noise is drawn anew in each forward from torch's global generator.
    The realized weights stand beside ``weight``, which is not touched, and are never saved.

    Args:
        model: patched by :func:`hf_reram.patch_model`.
        time: since programming, such as "1s", "1d", "10y", or seconds; None: right after programming, not aged.
        temperature: K; None takes ``config.temperature``, and the device's reference temperature if that is None.
        seed: number of the chip.

    Raises:
        ValueError: the model is not patched, or a bad time, temperature or seed.
    """
    state, layers = crossbar_state(model), crossbar_layers(model)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: allowed is an integer from 0 to 2^63 - 1")
    seconds = None if time is None else parse_time(time)
    kelvin = state.config.temperature if temperature is None else temperature
    state.config.device.equivalent_time(seconds or 0.0, kelvin)  # refuses a bad temperature before anything is drawn
    before = {name: (layer.deployed, layer.deployed_offset) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.deployed, layer.deployed_offset = realize(layer, seconds, kelvin, layer_seed(seed, name))
        yield model
    finally:
        for name, layer in layers.items():
            layer.deployed, layer.deployed_offset = before[name]


@torch.no_grad()
def realize(
    layer: CrossbarMixin, time: float | None, temperature: float | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the layer's cells hold, ``w_scale (g+ - g-) / Δg``, averaged over a weight's pairs: its weight, times the
    input scales, in its shape and dtype. And what is added digitally for the layer's input offset, (output channels,),
    None without one.

    Args:
        time: s, None for right after programming. temperature: K. seed: of this layer's cells.
    """
    device = layer.crossbar.config.device
    scale = layer.held_scale().float()
    generator = torch.Generator().manual_seed(seed)
    weight: Any = layer.weight
    if hasattr(weight, "full_tensor"):  # FSDP2 holds a shard of it; a chip is programmed whole
        weight = weight.full_tensor()
    cells = layer.cell_weight(weight)
    targets = device.conductance(cells.float() / scale.clamp(min=1e-30))
    held: Any = None
    for _ in range(layer.pairs):
        plus, minus = (program(device, target, generator).after(device, time, temperature) for target in targets)
        held = plus.sub_(minus) if held is None else held.add_(plus.sub_(minus))
    held = held.mul_(scale / (device.g_range * layer.pairs)).to(layer.weight.dtype)
    return held, layer.offset_output(map_weight(cells, layer.held_scale())) if layer.centered else None


@contextmanager
def digital_eval(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`digital` in eval mode; every module's own mode is restored afterwards."""
    with evaluating(model), digital(model):
        yield model


@contextmanager
def digital(model: nn.Module) -> Iterator[nn.Module]:
    """The patched model as the digital model that it was made from, for as long as the context lasts."""
    state = crossbar_state(model)
    before, state.digital = state.digital, True
    try:
        yield model
    finally:
        state.digital = before
