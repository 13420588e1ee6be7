"""Choose each layer's input range, shrink, gain, weight scale and ADC range from a few batches.

Statistics are taken of the digital model in two passes over the batches, the first for what is subtracted from each
input channel (and what it is divided by), the second for the rest: for each layer a histogram of |x| on a logarithmic
scale, and a uniform random sample of the vectors that meet the array.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import ReRAMConfig
from ..model.deploy import refuse_offloaded, warn_uncalled
from ..model.find import crossbar_layers, crossbar_states, is_chip
from ..model.finite import refuse_not_finite
from ..model.inputs import uncompiled
from ..model.sharding import gathered, is_sharded, of_first, processes, reshard
from ..nn.layer import BUFFERS
from ..nn.tensors import is_shard, whole
from .observation import Observation, ordinary
from .ranges import settle_drive
from .redundancy import copy_rows, spread_pairs
from .scales import by_array, settle_scale, share_input_scales, share_scales
from .sensitivity import measure_sensitivity
from .spread import spread_effects
from .statistics import Channels, LayerStatistics

logger = logging.get_logger(__name__)


@torch.inference_mode(False)  # training may follow
def calibrate(model: nn.Module, batches: Iterable, sensitivity: bool | None = None) -> nn.Module:
    """Set every crossbar layer's input range, shrink, gain, weight scale, ADC range, and pairs and rows of weights, in
    place; of all layers or, where it fails, of none. Of weights that are sharded (FSDP2) all processes calibrate
    together, with as many batches each, and the numbers are those of the first one's.

    Args:
        model: patched by :func:`patch_model`, or of parts that were.
        batches: what the model is called with: dicts of its arguments, tuples or tensors; at most
            ``config.calibration_batches`` of them are read, and kept while it runs. Where a batch has a 2-D
            ``attention_mask``, padding tokens are left out.
        sensitivity: also measure each output channel's Fisher information, needed for ``retention_loss``
            "sensitivity"; None: where the config asks for it.

    Raises:
        ValueError: the model is not patched or is deployed, weights are NaN or infinite, there is no batch, or a batch
            drives a layer with NaN.
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
    refuse_not_finite(model)
    if sensitivity is None:
        sensitivity = any(state.term == "sensitivity" for state in states)
    statistics = {name: LayerStatistics(layer, name, seed) for seed, (name, layer) in enumerate(layers.items())}
    kept = list(map(ordinary, itertools.islice(batches, max(s.config.calibration_batches for s in states))))
    observation = Observation(layers)
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
            share_input_scales(statistics, observation.leaders)
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
                layer.copies_output = True if layer in observation.changed else None
                layer.pairs_per_weight.fill_(1.0)
            for s in statistics.values():
                if s.samples is not None:  # else the input scale stays, which the copies are a part of
                    s.layer.row_copies.fill_(1.0)
            for state in states:
                _settle_all(_of(state, statistics), observation.leaders, state.config)
            if any(state.config.redundancy for state in states):
                _settle_redundant(model, kept, statistics, observation)
        if sensitivity:
            measure_sensitivity(model, kept)
        if processes() > 1 and is_sharded(model):
            _take_first_process(layers.values())
    return model


# As PyTorch says it of a CPU's, with no class of error for it.
OUT_OF_MEMORY = "can't allocate memory"

# What calibration sets beside buffers.
KEPT = ("sensitivity", "coherence", "copies_output", "clipped_by_choice", "choice_is_known", "calibrated_outputs")


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
def _take_first_process(layers: Iterable[Any], names: Sequence[str] = BUFFERS) -> None:
    """A chip of weights that are sharded is one chip, with one input range."""
    for layer in layers:
        numbers = {name: whole(getattr(layer, name).detach()).cpu() for name in names}
        own = numbers, layer.copies_output, layer.coherence, layer.sensitivity
        numbers, layer.copies_output, layer.coherence, sensitivity = of_first(own)
        if sensitivity is not None:
            layer.sensitivity = sensitivity.to(layer.input_offset.device)
        for name, value in numbers.items():
            own = getattr(layer, name)
            own.fill_(float(value)) if is_shard(own) else own.copy_(value)
        layer.forget_white_noise()
        layer.scalars()


def _settle_all(statistics: dict[str, LayerStatistics], leaders: dict[str, str], config: ReRAMConfig) -> None:
    """Choose the numbers of layers that were patched together."""
    for shared in _followers(statistics, leaders):
        with gathered(s.layer for s in shared):
            _settle(shared, config)
    share_scales(by_array(statistics))


def _settle_redundant(
    model: nn.Module, batches: list, statistics: dict[str, LayerStatistics], observation: Observation
) -> None:
    """Spend the cells on top, and choose the numbers of layers that have some anew: of quieter cells others may be
    best, and inputs that several rows share are smaller."""
    effects = _effects(model, batches)
    states = [state for state in crossbar_states(model) if state.config.redundancy]
    for state in states:
        own = _of(state, statistics)
        known = {name: effects[name] for name in own if name in effects}
        known = known if any(bool(effect.any()) for effect in known.values()) else {}
        if state.config.tile_size is not None:
            spread_pairs(own, state.config, known)
        else:
            copy_rows(own, observation.leaders, state.config, known)
    if processes() > 1 and is_sharded(model):  # all choose the rest for the same layers together
        _take_first_process((s.layer for s in statistics.values()), ("pairs_per_weight", "row_copies"))
    again = {name: LayerStatistics(s.layer, name, seed) for seed, (name, s) in enumerate(statistics.items())}
    for name, before in statistics.items():
        again[name].offset, again[name].scale = before.offset, before.scale * before.layer.row_copies
    if any(s.layer.copied for s in statistics.values()):
        with uncompiled(), observation.watching(model):
            observation.run(model, batches, again)
        reshard(model)
    for state in states:
        groups = _followers(_of(state, statistics), observation.leaders)
        changed = [group for group in groups if any(s.layer.copied or s.layer.pairs > 1 for s in group)]
        found = {s.name: again[s.name] if s.layer.copied else s for group in changed for s in group}
        _settle_all(found, observation.leaders, state.config)


def _of(state: Any, statistics: dict[str, LayerStatistics]) -> dict[str, LayerStatistics]:
    """Those of the layers that were patched together."""
    return {name: found for name, found in statistics.items() if found.layer.crossbar is state}


def _effects(model: nn.Module, batches: list) -> dict[str, Tensor]:
    """Those of each layer's spread, or nothing, said so, where no gradient of predictions tells them."""
    try:
        return spread_effects(model, batches)
    except (ValueError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in why:
            raise
        if isinstance(error, RuntimeError) and processes() > 1 and is_sharded(model):  # perhaps of this process alone
            raise
        logger.warning(
            "cells on top go where a layer's own relative error is largest, as its effect is unknown: %s", why
        )
        return {}


def _followers(statistics: dict[str, LayerStatistics], leaders: dict[str, str]) -> list[list[LayerStatistics]]:
    """The layers that were reached, those together that read the same input."""
    followers: dict[str, list[LayerStatistics]] = {}
    for name, found in statistics.items():
        if found.samples is not None:
            followers.setdefault(leaders[name], []).append(found)
    return list(followers.values())


def _settle(shared: list[LayerStatistics], config: ReRAMConfig) -> None:
    settle_drive(shared, config)
    for statistics in shared:
        settle_scale([statistics])
