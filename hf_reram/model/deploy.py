"""A model as one chip: cells programmed once, then found as they are at a time and temperature."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

from ..device.seeds import checked_seed, derived_seed
from ..device.temperature import parse_temperature
from ..device.time import parse_time
from ..nn import CrossbarLayer
from ..nn.array import Chip
from ..nn.clipping import warn_clipped
from ..nn.places import parameter_of
from .cells import cells_at, chip_of, held_of
from .find import (
    calls_around,
    chip_names,
    crossbar_layers,
    crossbar_state,
    crossbar_states,
    is_chip,
    is_digital,
    ran,
    ran_around,
    reset_calls,
    uncalled,
)
from .inputs import evaluating
from .read_back import ReadBack
from .sharding import any_process, is_sharded, processes, reshard

logger = logging.get_logger(__name__)


@contextmanager
def deploy(
    model: nn.Module,
    time: str | float | None = None,
    temperature: str | float | None = None,
    seed: int = 0,
    conductances: str | Path | ReadBack | None = None,
) -> Iterator[nn.Module]:
    """The model as chip number ``seed``, ``time`` after programming, for as long as the context lasts; or on cells
    whose ``conductances`` were read back from an array.

    Every cell draws its programming error and its retention variate once per seed, so the same seed is the same chip at
    every time and it ages along one curve, whatever wraps the model, and for an encoder alone as inside a model with a
    head. Read noise is drawn anew in each forward from torch's global generator. The realized weights stand beside
    ``weight``, which is not touched, and are never copied or saved. Of several contexts the one entered last counts.

    Of weights that are sharded (FSDP2) all processes deploy the same chip, and begin and end it together.

    Crossbar layers that did not run although the model did are named in a warning: these were no chip. So are those
    whose weights have changed since calibration so that many are beyond what their cells can hold, as merged adapters
    may be, and tiles of ``conductances`` that hardly hold what they were to hold.

    Args:
        model: patched by :func:`hf_reram.patch_model`, or of parts that were.
        time: since programming, such as "1s", "1d", "10y", or seconds; None: right after programming, not aged.
        temperature: K, or a text such as "85C"; None takes ``config.temperature``, and the device's reference
            temperature if that is None.
        seed: number of the chip.
        conductances: folder of :func:`hf_reram.export_conductances`, with what was read from an array in its files, in
            place of a simulated chip; it says itself at which time and temperature. One that was exported for a chip
            is that chip, bit for bit. Read noise and converters are simulated.

    Raises:
        ValueError: the model is not patched or is digital here, or a bad time, temperature or seed. Or conductances are
            of another model, other weights, another calibration or other hardware; layers are missing, of other shapes,
            no cell can have them, as where they are NaN, negative or in another unit, or tiles were not read but are as
            they were exported; or a time, temperature or seed is given beside them.
        OSError: no such folder of conductances.
        RuntimeError: at the end, weights or numbers of calibration have changed in between, which were no longer the
            chip's.
    """
    seed = checked_seed(seed)
    seconds = None if time is None else parse_time(time)
    temperature = None if temperature is None else parse_temperature(temperature)
    if conductances is not None and (seconds is not None or temperature is not None or seed):
        raise ValueError(
            f"time={time!r}, temperature={temperature!r}, seed={seed!r} with conductances={str(conductances)!r}: "
            "allowed are no others than the folder says"
        )
    refuse_offloaded(model)
    refuse_computed(model)
    if is_digital(model):
        raise ValueError("the model is digital here, so that it can be no chip: deploy it outside of hf_reram.digital")
    states = crossbar_states(model)
    for state in states:  # refuses a bad temperature before anything is drawn
        state.config.device.equivalent_time(seconds or 0.0, kelvin(state.config.temperature, temperature))
    reshard(model)
    array = None if conductances is None else ReadBack.of(model, conductances)
    layers, token = chip_names(model), object()
    own = {layer: name for name, layer in crossbar_layers(model).items()}  # of those that share a weight, too
    for state in states:
        state.chips, state.deployments = state.chips + 1, state.deployments + 1
    try:
        with torch.inference_mode(False):
            for layer, name in layers.items():
                layer.look_again()  # compiled code takes its numbers as they were looked at last
                heat = kelvin(layer.crossbar.config.temperature, temperature)
                chip = (
                    array.chip(own[layer], layer) if array else realize(layer, seconds, heat, derived_seed(seed, name))
                )
                layer.put(token, chip)
        if array:
            array.refuse_wrong()
            for note in array.notes():
                _warn_once(model, note)
        warn_uncalibrated(model)
        warn_clipped(layers)
        reset_calls(model)
        beside = calls_around(model)
        before = [state.deployments for state in states]
        yield model
        reshard(model)
        refuse_changed(layers, processes() > 1 and is_sharded(model))
        warn_uncalled(model, "were not called while the model was deployed: what it computed is not a chip's there")
        alone = [state.deployments for state in states] == before  # else parts around it are deployed themselves
        if alone and (names := ran_around(model, beside)):
            what = "crossbar layers around the model ran while it was deployed, and are no chip"
            _warn_once(model, f"{what}: deploy the whole model: {', '.join(names)}")
    finally:
        for state in states:
            state.chips -= 1
        for layer in (layer for layer in layers if isinstance(layer, CrossbarLayer)):  # still
            layer.put(token, None)


def refuse_modes(model: nn.Module, what: str) -> None:
    """
    Args:
        what: to be done outside.

    Raises:
        ValueError: the model is a chip or digital already, so that no number would be of what it says.
    """
    if is_digital(model):
        raise ValueError(f"the model is digital here: {what} outside of hf_reram.digital")
    if is_chip(model):
        raise ValueError(f"the model is deployed as a chip here: {what} outside of hf_reram.deploy")


def refuse_offloaded(model: nn.Module) -> None:
    """
    Raises:
        ValueError: weights of crossbars are not there, as where accelerate has offloaded them.
    """
    away = [name for name, layer in crossbar_layers(model).items() if layer.weight.is_meta]
    if away:
        raise ValueError(
            f"the weights of {len(away)} crossbar layers are on the meta device, as where accelerate has offloaded "
            f"them: allowed is a model that is loaded whole: {', '.join(away)}"
        )


def refuse_computed(model: nn.Module) -> None:
    """
    Raises:
        ValueError: weights of crossbars are made by hooks that run in a forward only, so that they may be old.
    """
    computed = [
        name
        for name, layer in crossbar_layers(model).items()
        if parameter_of(layer) is None and not is_parametrized(layer)
    ]
    if computed:
        raise ValueError(
            f"the weights of {len(computed)} crossbar layers are computed by hooks in each forward (weight norm, "
            f"pruning): make them parameters before deploying, as torch.nn.utils.prune.remove does: "
            f"{', '.join(computed)}"
        )


def refuse_changed(layers: dict[CrossbarLayer, str], sharded: bool = False) -> None:
    """
    Args:
        sharded: other processes hold the other parts of the weights, and ask too.

    Raises:
        RuntimeError: the weights of layers that are deployed, or their numbers of calibration, have changed, by
            whatever.
    """
    flags = [
        isinstance(layer, CrossbarLayer)
        and layer.chip is not None
        and not layer.weight.is_meta
        and layer.chip.source.has_changed(layer)
        for layer in layers
    ]
    if sharded:
        flags = any_process(flags, next(iter(layers)).input_range.device)
    if changed := [name for name, flag in zip(layers.values(), flags) if flag]:
        raise RuntimeError(
            f"the weights or numbers of calibration of {len(changed)} layers changed while the model was deployed, "
            f"whose outputs since are of no chip: change them outside of deploy: {', '.join(changed)}"
        )


def kelvin(configured: float | None, temperature: float | None) -> float | None:
    """The temperature [K] that was asked for, or the config's."""
    return configured if temperature is None else temperature


def warn_uncalled(model: nn.Module, what: str, names: list[str] | None = None) -> None:
    """Name crossbar layers that were not called, once for each set of a model's layers.

    Args:
        what: they were not, as the end of a sentence. names: of these layers; None: those that have not run since calls
            were counted from 0, if the model has.
    """
    if names is None:
        names = uncalled(model) if ran(model) else []
    if not names:
        return
    layers = crossbar_layers(model)
    warned = crossbar_state(model).warned
    if (key := (what, *names)) not in warned:
        warned.add(key)
        shown = ", ".join(name or type(layers[name]).__name__ for name in names)
        logger.warning("%d of %d crossbar layers %s: %s", len(names), len(layers), what, shown)


def _warn_once(model: nn.Module, text: str) -> None:
    """Once for each model."""
    warned = crossbar_state(model).warned
    if text not in warned:
        warned.add(text)
        logger.warning("%s", text)


# What layers compute with before calibration, by whether each token has its own input range.
UNCALIBRATED = {
    False: "each batch spans an input range of its own",
    True: "their gains and offsets are not set, and each batch spans an ADC's range of its own",
}


def uncalibrated(model: nn.Module) -> dict[str, list[str]]:
    """Names of the crossbar layers that nothing is known of from data, by what they do instead, as no chip does."""
    found: dict[str, list[str]] = {}
    for name, layer in crossbar_layers(model).items():
        if not layer.calibrated:
            found.setdefault(UNCALIBRATED[layer.scalars().per_token], []).append(name)
    return found


def warn_uncalibrated(model: nn.Module) -> None:
    """Name crossbar layers that are not calibrated, once for each set of a model's layers."""
    for what, names in uncalibrated(model).items():
        what = f"are not calibrated: {what}, which no chip does; call hf_reram.calibrate(model, batches)"
        warn_uncalled(model, what, names)


def realize(layer: CrossbarLayer, time: float | None, temperature: float | None, seed: int) -> Chip:
    """The layer as a chip: what its cells are found at, see :func:`.cells.chip_of`.

    Args:
        time: s, None for right after programming. temperature: K. seed: of this layer's cells.
    """
    programmed = held_of(layer)
    return chip_of(layer, programmed, cells_at(layer, programmed, time, temperature, seed))


@contextmanager
def digital_eval(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`digital` in eval mode; every module's own mode is restored afterwards."""
    with evaluating(model), digital(model):
        yield model


@contextmanager
def digital(model: nn.Module) -> Iterator[nn.Module]:
    """The patched model as the digital model that it was made from, for as long as the context lasts."""
    states = crossbar_states(model)
    for state in states:
        state.digital_contexts += 1
    try:
        yield model
    finally:
        for state in states:
            state.digital_contexts -= 1
