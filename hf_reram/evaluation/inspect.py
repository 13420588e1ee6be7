"""Layer by layer: what is on a crossbar, how it is driven, and how much retention disturbs it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..device.moments import SOURCES
from ..device.temperature import parse_temperature
from ..device.time import parse_time
from ..model.deploy import refuse_modes, warn_uncalled
from ..model.find import crossbar_layers, crossbar_states, reset_calls
from ..model.finite import refuse_not_finite
from ..model.inputs import call_model, evaluating, uncompiled
from ..model.sharding import gathered, reshard
from ..nn.array import cell_weight, ideal
from ..nn.forward import add_term
from ..nn.scalars import read_scalars
from ..nn.tensors import whole
from ..nn.terms import weight_term


@dataclass(frozen=True)
class LayerReport:
    """One crossbar layer.

    Attributes:
        name, kind: qualified name, and the digital layer's class. rows, columns: of its array, groups side by side,
            copies of rows included. cells: two a weight, pair and copy. pairs_per_weight: in a row.
        range_kind: of its input range, "static", "learned", or "per_token".
        input_range: of the DAC in units of the input; None where not calibrated, and where each token has its own.
        centered, equalized: whether it subtracts an offset from its input, and divides its channels by scales.
        b: how far a full-scale input goes into the sinh.
        clipped: share of the weights beyond w_scale. noise_to_signal: of all that befalls its cells, ``E|ΔW φ|² /
            E|W φ|²`` with data, else ``|ΔW|² / |W|²``; None for a layer that was not called.
        tiles: that its rows are spread over.
        sources: the same ratio of each source of error alone, the worst first: of its cells, and with data of read
            noise and ADC, which come on top of ``noise_to_signal``; none for a layer that was not called.
    """

    name: str
    kind: str
    rows: int
    columns: int
    cells: int
    pairs_per_weight: int
    range_kind: str
    input_range: float | None
    centered: bool
    equalized: bool
    b: float
    clipped: float
    noise_to_signal: float | None
    tiles: int = 1
    sources: dict[str, float] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """Of each source in the sum of all, the worst first; what they do to one another, as where a stuck cell does
        not drift, is no one's."""
        total = sum(self.sources.values())
        return {source: ratio / total if total else 0.0 for source, ratio in self.sources.items()}


def inspect_layers(
    model: nn.Module,
    time: str | float,
    temperature: float | None = None,
    batches: Iterable[Any] | None = None,
) -> list[LayerReport]:
    """Every crossbar layer at a time after programming, the most disturbed ones first. Of weights that are sharded
    (FSDP2), all processes have to ask for it, with as many batches.

    Args:
        model: patched. time: see :func:`hf_reram.deploy`. temperature: K; None takes the config's.
        batches: of model inputs, to weigh errors with the layers' own inputs; None: by the weights alone.

    Raises:
        ValueError: the model is not patched, digital or deployed here, weights are NaN or infinite, or a bad time or
            temperature.
    """
    refuse_modes(model, "inspect its layers")
    refuse_not_finite(model)
    layers = crossbar_layers(model)
    kelvin = None if temperature is None else parse_temperature(temperature)
    seconds = parse_time(time)
    with _aged(model, seconds, kelvin), torch.no_grad():
        if batches is not None:
            ratios, sources = _by_data(model, batches, seconds, kelvin)
        else:
            ratios, sources = _by_weights(layers), {}
    if batches is None:
        for source in SOURCES:
            with _aged(model, seconds, kelvin, source), torch.no_grad():
                sources[source] = _by_weights(layers)
    reshard(model)
    found = []
    for name, layer in layers.items():
        now = read_scalars(layer)
        weight = cell_weight(layer, whole(layer.weight.detach()))
        rows = layer.to_rows(weight)
        beyond = (weight.abs() > layer.held_scale()).float().mean()
        found.append(
            LayerReport(
                name=name,
                kind=layer._digital_class.__name__,
                rows=int(layer.copies_of_rows().sum(2).max()),
                columns=rows.shape[0] * rows.shape[1],
                cells=layer.cells,
                pairs_per_weight=layer.pairs,
                range_kind=layer.range_kind,
                input_range=None if now.per_token else now.input_range or None,
                centered=layer.centered,
                equalized=layer.equalized,
                b=now.b,
                clipped=float(beyond),
                noise_to_signal=ratios.get(name),
                tiles=layer.tiles(),
                sources=_worst_first({source: found[name] for source, found in sources.items() if name in found}),
            )
        )
    return sorted(found, key=lambda layer: math.inf if layer.noise_to_signal is None else -layer.noise_to_signal)


def _worst_first(sources: dict[str, float]) -> dict[str, float]:
    return dict(sorted(sources.items(), key=lambda item: -item[1]))


@contextmanager
def _aged(model: nn.Module, seconds: float, temperature: float | None, source: str | None = None) -> Iterator[None]:
    """Closed forms inside are those at the given time and temperature, and of one source of error alone if given."""
    before = [(state, state.physics) for state in crossbar_states(model)]
    try:
        for state, physics in before:
            state.physics = physics.aged(seconds, temperature, source)
        yield
    finally:
        for state, physics in before:
            state.physics = physics


def _by_weights(layers: dict) -> dict[str, float]:
    ratios = {}
    for name, layer in layers.items():
        with gathered([layer]):
            ratios[name] = _ratio(weight_term(layer, ideal(layer, layer.scalars())))
    return ratios


def _by_data(
    model: nn.Module, batches: Iterable[Any], seconds: float, temperature: float | None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Of the batches together, and of each source alone."""
    layers, states = crossbar_layers(model), crossbar_states(model)
    before = [(state, state.measure, state.physics, state.forward) for state in states]
    sums: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[str, torch.Tensor]] = {}
    reset_calls(model)
    with uncompiled(), evaluating(model):  # compiled code does not measure
        try:
            for state in states:
                state.measure, state.physics = True, replace(state.physics, term=None)
                state.sources = {source: state.physics.error_at(seconds, temperature, source) for source in SOURCES}
            for layer in layers.values():
                layer.training = True  # only these: they then account for their errors
            for batch in batches:
                call_model(model, batch)
                for name, layer in layers.items():
                    pair = layer.crossbar.forward.ratios.pop(layer.crossbar_name, None)
                    if pair is not None:
                        add_term(sums, name, pair)
                    for source, found in layer.crossbar.forward.sources.items():
                        if layer.crossbar_name in found:
                            add_term(apart.setdefault(source, {}), name, found.pop(layer.crossbar_name))
        finally:
            for state, measure, physics, forward in before:
                state.measure, state.physics, state.forward, state.sources = measure, physics, forward, None
    warn_uncalled(model, "were not called on these data: they are shown without a noise-to-signal ratio")
    ratios = {source: {name: _ratio(pair) for name, pair in found.items()} for source, found in apart.items()}
    return {name: _ratio(pair) for name, pair in sums.items()}, ratios


def _ratio(pair: torch.Tensor) -> float:
    return float(pair[0] / pair[1].clamp(min=1e-30))
