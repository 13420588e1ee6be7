"""The files in which the conductances of a model's arrays leave and come back: what each is called, what is in it, and
what no cell can have."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..device.cell import DeviceConfig
from ..device.checks import shown
from ..device.time import format_time
from ..nn import CrossbarLayer
from .cells import Rows

ABOUT = "conductances.json"
FORMATS = ("safetensors", "csv")
UNIT = "µS"
UNITS = (UNIT, "μS", "uS")  # with the micro sign, with the Greek letter, and without either
POLARITIES = ("plus", "minus")
PLACE = ("group", "input_channel", "kernel_element", "copy")  # of a row, in front of its conductances in CSV

# Where conductances come from, and what each is called in a report.
ORIGINS = {"targets": "target array", "simulated": "simulated array", "measured": "measured array"}

# A cell conducts at most so many times g_max, and the best one of a model at least this share of it.
MOST, LEAST = 10.0, 0.01


def in_words(origin: str, name: str, time: float | None, temperature: float | None) -> str:
    """An array, and when and where its conductances were read: seconds since programming and kelvins, where known."""
    when = "" if time is None else f" after {format_time(time)}"
    return f"{ORIGINS[origin]} {name}{when}" + ("" if temperature is None else f" at {temperature:g} K")


def file_name(layer: str, ending: str) -> str:
    """What a layer's file is called, whatever its name holds."""
    return f"{quote(layer, safe='') or 'model'}.{ending}"


def csv_name(layer: str, tile: int) -> str:
    """The same of a tile's CSV file."""
    return file_name(layer, f"tile{tile}.csv")


def digest_of(found: Tensor) -> str:
    """SHA-256 of a layer's conductances, (2, rows, columns, pairs), in hexadecimal."""
    return hashlib.sha256(found.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def digest_of_export(exported: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
    """SHA-256 of what a folder says that was exported and of its layers, in hexadecimal, however it is laid out."""
    text = json.loads(json.dumps([exported, layers]), parse_int=float)  # other programs write 1.0 as 1
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def write_safetensors(folder: Path, name: str, layer: CrossbarLayer, rows: Rows, found: Tensor) -> None:
    """``tile0.plus``, ``tile0.minus``, ``tile1.plus``, ..., (rows of the tile, columns of a group, pairs) each."""
    tensors = {}
    for tile in range(layer.tiles()):
        for polarity, g in zip(POLARITIES, found[:, rows.tile == tile].cpu()):
            tensors[f"tile{tile}.{polarity}"] = g.contiguous()
    save_file(tensors, folder / file_name(name, "safetensors"), {"unit": UNIT})


def read_safetensors(path: Path, layer: CrossbarLayer, rows: Rows) -> Tensor:
    """The inverse, (2, rows, columns, pairs).

    Raises:
        ValueError: other tensors, or of other shapes or kinds of numbers; names them.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found = torch.empty(2, *array_shape(layer, rows))
    names = {f"tile{tile}.{polarity}" for tile in range(layer.tiles()) for polarity in POLARITIES}
    if tensors.keys() != names:
        raise ValueError(f"{path} holds {shown(sorted(tensors))}: allowed are {shown(sorted(names))}")
    for tile in range(layer.tiles()):
        there = rows.tile == tile
        shape = int(there.sum()), *found.shape[2:]
        for polarity, into in zip(POLARITIES, found):
            g = tensors[name := f"tile{tile}.{polarity}"]
            if tuple(g.shape) != shape or not g.is_floating_point():
                kind = str(g.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{path}: {name} is {tuple(g.shape)} of {kind}: allowed are {shape}, rows, columns and pairs, of a "
                    "floating-point type"
                )
            into[there] = g.float()
    return found


def array_shape(layer: CrossbarLayer, rows: Rows) -> tuple[int, int, int]:
    """Rows, columns of a group and pairs of a layer's array."""
    return len(rows.row), layer.outputs // layer.groups, layer.pairs


def csv_header(layer: CrossbarLayer) -> str:
    """A CSV file's first line: where a row is, then its conductances, with their unit."""
    cells = [
        f"column{column}_pair{pair}_{polarity}_uS"
        for column in range(layer.outputs // layer.groups)
        for pair in range(layer.pairs)
        for polarity in POLARITIES
    ]
    return ",".join((*PLACE, *cells))


def _places(layer: CrossbarLayer, rows: Rows) -> np.ndarray:
    """The columns of :data:`PLACE`, (rows, 4)."""
    channel = rows.group * (layer.inputs // layer.groups) + rows.row // layer.area
    return torch.stack((rows.group, channel, rows.row % layer.area, rows.copy), 1).double().cpu().numpy()


def write_csv(folder: Path, name: str, layer: CrossbarLayer, rows: Rows, found: Tensor) -> None:
    """A file a tile, a line a row, with as many digits as float32 has."""
    places, cells = _places(layer, rows), found.permute(1, 2, 3, 0).flatten(1).double().cpu().numpy()
    for tile in range(layer.tiles()):
        there = (rows.tile == tile).cpu().numpy()
        table, header = np.concatenate((places[there], cells[there]), 1), csv_header(layer)
        np.savetxt(folder / csv_name(name, tile), table, "%.9g", ",", header=header, comments="", encoding="utf-8")


def read_csv(folder: Path, name: str, layer: CrossbarLayer, rows: Rows) -> Tensor:
    """The inverse, (2, rows, columns, pairs).

    Raises:
        ValueError: another first line, rows in another order, or no numbers; names the file.
    """
    shape, places = array_shape(layer, rows), _places(layer, rows)
    found = torch.empty(shape[0], shape[1] * shape[2] * 2)
    for tile in range(layer.tiles()):
        path, there = folder / csv_name(name, tile), (rows.tile == tile).cpu()
        try:
            with open(path, encoding="utf-8-sig") as file:
                header = file.readline().strip()
                if header != csv_header(layer):
                    raise ValueError(f"its first line is {shown(header)}: allowed is {shown(csv_header(layer))}")
                table = np.loadtxt(file, delimiter=",", ndmin=2)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        wanted = places[there.numpy()]
        if table.shape != (len(wanted), wanted.shape[1] + found.shape[1]):
            raise ValueError(
                f"{path} has {table.shape[0]} rows of {table.shape[1]} numbers: allowed are {len(wanted)} of "
                f"{wanted.shape[1] + found.shape[1]}"
            )
        if not np.array_equal(table[:, : len(PLACE)], wanted):
            raise ValueError(f"{path} has other rows, or in another order: allowed is that of {', '.join(PLACE)}")
        found[there] = torch.from_numpy(table[:, len(PLACE) :]).float()
    return found.unflatten(1, (shape[1], shape[2], 2)).permute(3, 0, 1, 2).contiguous()


def refuse_impossible(name: str, found: Tensor, device: DeviceConfig) -> None:
    """
    Args:
        name: of the layer. found: its conductances [µS].

    Raises:
        ValueError: some are NaN, infinite, negative, or far beyond what a cell conducts; counts them.
    """
    infinite, negative, absurd = ~found.isfinite(), found < 0, found > MOST * device.g_max
    for bad, what in (
        (infinite, "NaN or infinite"),
        (negative, "negative"),
        (absurd, f"above {MOST * device.g_max:g} µS, {MOST:g} times g_max"),
    ):
        if count := int(bad.sum()):
            polarity, row, column, pair = bad.nonzero()[0].tolist()
            first = float(found[polarity, row, column, pair])
            raise ValueError(
                f"layer {name!r}: {count} of {found.numel()} conductances are {what}, the first one in row {row}, "
                f"column {column}, pair {pair}, {POLARITIES[polarity]} ({first:g}): "
                f"allowed are finite ones in µS from 0 to {MOST * device.g_max:g}"
            )


def refuse_other_unit(largest: Iterable[tuple[float, float]]) -> None:
    """
    Args:
        largest: of each layer's conductances, and its device's g_max, in µS.

    Raises:
        ValueError: all are so small that they are in another unit, or of cells that were never programmed.
    """
    pairs = list(largest)
    share = max((found / g_max for found, g_max in pairs), default=1.0)
    if share < LEAST:
        unit = next((unit for unit, size in (("mS", 1e-4), ("S", 0.0)) if share > size), None)
        raise ValueError(
            f"the largest conductance is {max(found for found, _ in pairs):g} µS where g_max is "
            f"{max(g_max for _, g_max in pairs):g} µS{f': are these in {unit}?' if unit else ''}: allowed are "
            "conductances in µS of arrays that were programmed"
        )


def files_there(folder: Path, name: str, layer: CrossbarLayer) -> dict[str, bool]:
    """In which formats a layer's conductances are in a folder, by format; all tiles of it."""
    tiles = [folder / csv_name(name, tile) for tile in range(layer.tiles())]
    return {"safetensors": (folder / file_name(name, "safetensors")).is_file(), "csv": all(p.is_file() for p in tiles)}


def some_there(folder: Path, name: str, layer: CrossbarLayer) -> Iterator[Path]:
    """The CSV files of a layer's tiles that are there."""
    yield from (p for tile in range(layer.tiles()) if (p := folder / csv_name(name, tile)).is_file())
