"""A model's conductances for a lab: tile by tile, with all that it takes to program them and to read a layer's
output."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import converter_levels, dac_grid
from ..device.checks import shown
from ..device.seeds import checked_seed, derived_seed
from ..device.temperature import parse_temperature
from ..device.time import format_time, parse_time
from ..nn import CrossbarLayer
from ..nn import array as cells_of
from ..nn.clipping import warn_clipped
from ..nn.scalars import read_scalars
from ..nn.tensors import whole
from ..version import __version__
from .array_files import (
    ABOUT,
    FORMATS,
    MOST,
    UNIT,
    csv_name,
    digest_of,
    digest_of_export,
    file_name,
    refuse_impossible,
    refuse_other_unit,
    write_csv,
    write_safetensors,
)
from .cells import Rows, cells_at, held_of, to_array
from .deploy import kelvin, refuse_computed, refuse_modes, refuse_offloaded, warn_uncalibrated
from .digest import weights_digest
from .find import chip_names, crossbar_layers, crossbar_states
from .finite import refuse_not_finite
from .lab import README
from .likeness import ALIKE, ERRORS, SHARE
from .read_back import EXPORTED, NEGATIVE, VERSION, array_of, retention_notes
from .sharding import alike, is_first, is_sharded, of_first, processes, reshard


def export_conductances(
    model: nn.Module,
    folder: str | Path,
    time: str | float | None = None,
    temperature: str | float | None = None,
    seed: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> Path:
    """Write the conductances of a model's crossbars, tile by tile, with layout, scales and a README that says how to
    program them and how to compute the layers' outputs from currents. The folder is there whole or not at all.

    What was read back from an array is put into the same files: then :func:`hf_reram.deploy` and
    :func:`hf_reram.evaluate_robustness` take the folder as ``conductances``.

    Of weights that are sharded (FSDP2), all processes have to ask for it; the first one writes.

    Args:
        model: patched and calibrated. folder: new, or empty.
        time: since programming, of a chip; None: right after programming. temperature: K, or a text such as "85C"; None
            takes what :func:`hf_reram.deploy` takes by itself.
        seed: of a chip, whose cells are written as they are found; None: what the cells are to be programmed to.
        formats: "safetensors", "csv", or both. CSV of large models is slow, and large.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched, digital or deployed here; weights are NaN or infinite; PEFT keeps copies
            of layers beside those in use; the folder holds something; a bad time, temperature, seed or format, or a
            time or temperature without a seed; or conductances are negative, which a device may have whose
            ``floor_at_zero`` is False.
    """
    seed = None if seed is None else checked_seed(seed)
    seconds = None if time is None else parse_time(time)
    asked = None if temperature is None else parse_temperature(temperature)
    if seed is None and (time is not None or temperature is not None):
        raise ValueError(f"time={time!r}, temperature={temperature!r}: allowed are they with the seed of a chip")
    if isinstance(formats, (str, bytes)) or not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats={shown(formats)}: allowed are some of {list(FORMATS)}")
    refuse_modes(model, "export its conductances")
    refuse_offloaded(model)
    refuse_computed(model)
    refuse_not_finite(model)
    states, layers, seeds = crossbar_states(model), crossbar_layers(model), chip_names(model)
    shared = array_of(model)
    for state in states:
        state.config.device.equivalent_time(seconds or 0.0, kelvin(state.config.temperature, asked))
    heats = {kelvin(state.config.kelvin, asked) for state in states}
    about: dict[str, Any] = {
        "format": "hf_reram conductances",
        "version": VERSION,
        "origin": "targets" if seed is None else "simulated",
        "array": None,
        "unit": UNIT,
        "time": seconds,
        "temperature": heats.pop() if seed is not None and len(heats) == 1 else None,
        "seed": seed,
        "hf_reram": __version__,
        "weights": weights_digest(model),
        "base_weights": weights_digest(model, base=True),
        "configs": [state.config.to_dict() for state in states],
    }
    reshard(model)
    together = processes() > 1 and is_sharded(model)
    writes = is_first() or not together
    warn_uncalibrated(model)
    warn_clipped(layers.values())
    entries, largest = {}, {}
    with _whole_folder(Path(folder), writes, together) as into:
        for name, layer in layers.items():
            layer.look_again()
            programmed, rows = held_of(layer), Rows.of(layer)
            entries[name] = _entry(layer, programmed, rows) | {"array": shared[name]}
            if shared[name] != name:
                continue
            heat = kelvin(layer.crossbar.config.temperature, asked)
            own = None if seed is None else derived_seed(seed, seeds[layer])
            found = to_array(layer, rows, list(cells_at(layer, programmed, seconds, heat, own)))
            with alike(together, "the export"):
                refuse_impossible(name, found, layer.crossbar.config.device)
                if found.numel():
                    largest[name] = float(found.max()), layer.crossbar.config.device.g_max
                entries[name] |= {"files": _files(name, layer, formats), "sha256": digest_of(found)}
                if writes and "safetensors" in formats:
                    write_safetensors(into, name, layer, rows, found)
                if writes and "csv" in formats:
                    write_csv(into, name, layer, rows, found)
        reshard(model)
        with alike(together, "the export"):
            refuse_other_unit(largest.values())
            if writes:
                about["exported"] = {name: about[name] for name in EXPORTED}
                about["exported"]["notes"] = retention_notes(model, seconds, about["temperature"] or asked)
                about["sha256"] = digest_of_export(about["exported"], entries)
                text = json.dumps({**about, "layers": entries}, indent=1, ensure_ascii=False, allow_nan=False)
                (into / ABOUT).write_text(text + "\n", encoding="utf-8")
                (into / "README.md").write_text(_readme(about, formats, states), encoding="utf-8")
    return Path(folder)


@contextmanager
def _whole_folder(folder: Path, writes: bool, together: bool) -> Iterator[Path]:
    """A folder beside it to write into, which takes its place at the end, or goes if that fails.

    Args:
        writes: this process; else it only waits. together: it does with others.
    """
    name = ""
    with alike(together, "the export"):
        if writes:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(
                    f"folder={str(folder)!r}: allowed is a new or an empty folder; this one holds something"
                )
            folder.parent.mkdir(parents=True, exist_ok=True)
            name = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
    into = Path(of_first(name) if together else name)
    try:
        yield into
        with alike(together, "the export"):
            if writes:
                mask = os.umask(0)  # there is no other way to ask for it
                os.umask(mask)
                os.chmod(into, 0o777 & ~mask)
                os.replace(into, folder)
    except BaseException:
        if writes:
            shutil.rmtree(into, ignore_errors=True)
        raise


def _files(name: str, layer: CrossbarLayer, formats: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "safetensors" in formats:
        found["safetensors"] = file_name(name, "safetensors")
    if "csv" in formats:
        found["csv"] = [csv_name(name, tile) for tile in range(layer.tiles())]
    return found


@torch.no_grad()
def _entry(layer: CrossbarLayer, programmed: Tensor, rows: Rows) -> dict[str, Any]:
    """How a layer lies on its array, how it is driven and how it is read; see :mod:`.lab`."""
    config, now = layer.crossbar.config, read_scalars(layer)
    device, levels = config.device, converter_levels(config.adc_bits)
    bias = None if layer.bias is None else whole(layer.bias.detach())
    if layer.centered:
        offset = cells_of.offset_output(layer, programmed)[1]
        bias = offset if bias is None else bias + offset
    kind = layer.range_kind if now.calibrated or now.per_token else "uncalibrated"
    dac_levels, floor = dac_grid(config.dac_bits, now.input_floor)
    current = device.g_range * device.read_voltage  # of a cell that is all on, and its I-V curve straight
    return {
        "class": layer._digital_class.__name__,
        "weight_shape": list(layer.weight.shape),
        "input_channels": layer.inputs,
        "output_channels": layer.outputs,
        "groups": layer.groups,
        "kernel_elements": layer.area,
        "rows": len(rows.row),
        "columns": layer.outputs // layer.groups,
        "pairs_per_weight": layer.pairs,
        "cells": 2 * layer.pairs * len(rows.row) * (layer.outputs // layer.groups),
        "tiles": [{"rows": int((rows.tile == tile).sum())} for tile in range(layer.tiles())],
        "row_copies": [int(copies) for copies in layer.row_copies.tolist()] if layer.copied else 1,
        "g_min_uS": device.g_min,
        "g_max_uS": device.g_max,
        "v0_V": device.v0,
        "input": {
            "kind": kind,
            "range": now.input_range if kind in ("static", "learned") else None,
            "offset": _numbers(layer.input_offset) if now.centered else 0,
            "scale": _numbers(layer.input_scale) if now.equalized else 1,
            "full_scale_V": now.b * device.v0,
            "dac_bits": config.dac_bits,
            "dac_levels": int(dac_levels),
            "lowest": floor,
        },
        "output": {
            "per_uA": now.gain / (now.b * device.v0 * device.g_range),
            "weight_scale": _numbers(layer.weight_scale),
            "adc_bits": config.adc_bits,
            "adc_levels": levels,
            "adc_full_scale_uA": float(layer.adc_range) * current if levels and now.adc_calibrated else None,
            "bias": 0 if bias is None else _numbers(bias),
        },
    }


def _numbers(t: Tensor) -> Any:
    """As lists, with all digits that float32 has; of one element, the number."""
    t = whole(t.detach()).float().cpu()
    return float(t) if t.numel() == 1 else t.tolist()


def _readme(about: dict[str, Any], formats: Sequence[str], states: Sequence[Any]) -> str:
    what = "what the cells are to be programmed to"
    if about["seed"] is not None:
        aged = "right after programming" if about["time"] is None else f"{format_time(about['time'])} after programming"
        heat = "" if about["temperature"] is None else f" at {about['temperature']:g} K"
        notes = "".join(f"; {note}" for note in about["exported"]["notes"])
        what = f"the cells of simulated chip {about['seed']}, {aged}{heat}{notes}. Nothing here was measured"
    files = {
        "safetensors": "- a safetensors file: `tile0.plus`, `tile0.minus`, `tile1.plus`, …, (rows, columns, pairs), "
        "float32;",
        "csv": "- CSV files, one a tile: a line a row, first which row it is (group, input channel, kernel element, "
        "copy), then its conductances, named in the first line by column, pair and polarity.",
    }
    configs = [state.config for state in states]
    dac = ", in the steps of the DAC: `round(u · input.dac_levels) / input.dac_levels`"
    adc = ", converted in steps of `output.adc_full_scale_uA / output.adc_levels` up to that full scale"
    return README.format(
        version=__version__,
        what=what,
        files="\n".join(files[name] for name in FORMATS if name in formats),
        dac=dac if any(config.dac_bits for config in configs) else "",
        adc=adc if any(config.adc_bits for config in configs) else "",
        most=MOST,
        negative=100 * NEGATIVE,
        share=100 * SHARE,
        alike=ALIKE,
        most_alike=1 / ALIKE,
        errors=ERRORS,
    )
