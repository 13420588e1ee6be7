"""Conductances that were read back from a real array, or come from another folder of
:func:`hf_reram.export_conductances`, in place of a simulated chip's."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ReRAMConfig
from ..device.cell import DeviceConfig
from ..device.checks import parse_json, shown, some
from ..device.moments import weight_error
from ..device.seeds import checked_seed, derived_seed
from ..device.temperature import parse_temperature
from ..device.time import parse_time
from ..nn import CrossbarLayer
from ..nn.array import Chip
from .array_files import (
    ABOUT,
    ORIGINS,
    UNITS,
    digest_of,
    digest_of_export,
    file_name,
    files_there,
    in_words,
    read_csv,
    read_safetensors,
    refuse_impossible,
    refuse_other_unit,
    some_there,
)
from .cells import Rows, cells_at, chip_of, from_array, held_of, to_array
from .digest import weights_digest
from .find import arrays, chip_names, crossbar_layers, crossbar_states
from .likeness import SHARE, Likeness, is_as_exported

VERSION = 2

# What a folder says of its conductances, and keeps of those that were exported when others are put in their place.
EXPORTED = ("origin", "time", "temperature", "seed")

NEGATIVE = 0.01  # of a layer's cells, and of the device's window: so many, and so low, are readings of 0

# Of layers that share a weight, what must be the same for its cells to be.
MAPPING = ("weight_scale", "pairs_per_weight", "input_scale", "row_copies")


class ReadBack:
    """A folder's conductances, held against a model: they are those of an array that was programmed from just these
    weights, calibration and hardware.

    Attributes:
        folder: that they are in. name: of the array, or the folder's. origin: "measured", "simulated" or "targets".
        time: s since programming when they were read. temperature: K, then; both None where the folder does not say.
        seed: of a simulated chip.
        unlike: tiles that hold what the device's cells hardly may by then, (layer, tile), and by what that shows.
        negative: how many conductances were slightly below 0 and are taken as 0, and the lowest [µS], by layer.
    """

    def __init__(self, model: nn.Module, folder: str | Path):
        """
        Args:
            model: patched.

        Raises:
            OSError: no such folder, or nothing in it says whose conductances these are. ValueError: they are another
                model's, of other weights, another calibration or other hardware; layers are missing; or what the
                folder says of them is not allowed.
        """
        self.folder = Path(folder)
        path = self.folder / ABOUT
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} is no folder of conductances: there is no {ABOUT} in it")
        try:
            about = parse_json(path.read_text(encoding="utf-8-sig"), "it")
            self._take(about)
            self._compare(model, about)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._arrays = array_of(model)
        names = chip_names(model)
        self._chips = {name: names[layer] for name, layer in crossbar_layers(model).items()}
        self._seen: dict[str, str] = {}
        self._largest: dict[str, tuple[float, float]] = {}
        self.unlike: dict[tuple[str, int], Likeness] = {}
        self.negative: dict[str, tuple[int, float]] = {}
        self._not_read: dict[tuple[str, int], bool] = {}
        self._of_retention = retention_notes(model, self.time, self.temperature) if self.origin == "simulated" else []
        missing = []
        for name in dict.fromkeys(self._arrays.values()):
            layer = crossbar_layers(model)[name]
            if not any(files_there(self.folder, name, layer).values()):
                missing.append(name)
        if missing:
            raise ValueError(
                f"{self.folder} lacks the conductances of {len(missing)} of {len(self._digests)} layers, as "
                f"safetensors or as CSV of all tiles: {some(map(repr, missing))}"
            )

    @classmethod
    def of(cls, model: nn.Module, folder: "str | Path | ReadBack") -> "ReadBack":
        """As it is, or of a folder."""
        return folder if isinstance(folder, ReadBack) else cls(model, folder)

    def _take(self, about: Any) -> None:
        """What the folder says of its conductances."""
        if not isinstance(about, Mapping) or about.get("format") != "hf_reram conductances":
            raise ValueError("it says nothing of conductances: allowed is what export_conductances writes")
        if about.get("version") != VERSION:
            raise ValueError(f"version={shown(about.get('version'))}: allowed is {VERSION}")
        if about.get("unit") not in UNITS:
            raise ValueError(f"unit={shown(about.get('unit'))}: allowed is µS")
        origin = about.get("origin")
        if not isinstance(origin, str) or origin not in ORIGINS:
            raise ValueError(f"origin={shown(origin)}: allowed is one of {sorted(ORIGINS)}")
        self.origin = origin
        time, kelvin, seed = (about.get(key) for key in ("time", "temperature", "seed"))
        self.time = None if time is None else parse_time(time)
        self.temperature = None if kelvin is None else parse_temperature(kelvin)
        if self.origin == "measured" and (time is None or kelvin is None):
            field, unit = ("time", "seconds since programming") if time is None else ("temperature", "K")
            raise ValueError(
                f"{field}=None: allowed, of conductances that were measured, are {unit} when they were read"
            )
        self.seed = None if seed is None else checked_seed(seed)
        name = about.get("array") or self.folder.resolve().name
        if not isinstance(name, str):
            raise ValueError(f"array={shown(name)}: allowed is a text, the array's name")
        self.name = name
        layers = about.get("layers")
        if not isinstance(layers, Mapping) or not all(isinstance(entry, Mapping) for entry in layers.values()):
            raise ValueError("layers: allowed is an object of layers by name")
        exported = about.get("exported")
        if not isinstance(exported, Mapping) or about.get("sha256") != digest_of_export(exported, layers):
            raise ValueError(
                "exported, layers: these are not what was exported; allowed is to change origin, time, temperature and "
                "array, and to leave how layers are driven and read as it is"
            )
        self._exported = exported
        self._digests = {name: entry.get("sha256") for name, entry in layers.items()}
        if self.origin != "measured" and any(about.get(name) != exported.get(name) for name in EXPORTED):
            raise ValueError(
                f"origin={origin!r}, time={shown(time)}, temperature={shown(kelvin)}, seed={shown(seed)}: this is not "
                'what was exported; of what was read from an array, the origin is "measured"'
            )

    def _compare(self, model: nn.Module, about: Mapping[str, Any]) -> None:
        """That they are this model's."""
        layers = crossbar_layers(model)
        if self._digests.keys() != layers.keys():
            unknown, lacking = self._digests.keys() - layers.keys(), layers.keys() - self._digests.keys()
            raise ValueError(
                "these are another model's conductances: "
                + "; ".join(
                    f"{what} {some(map(repr, sorted(names)))}"
                    for what, names in (("it has layers", unknown), ("it lacks", lacking))
                    if names
                )
            )
        now = [state.config for state in crossbar_states(model)]
        configs = about.get("configs")
        if not isinstance(configs, Sequence) or len(configs) != len(now):
            raise ValueError(f"configs={shown(configs)}: allowed are {len(now)}, one for each part of the model")
        exported = [ReRAMConfig.from_dict(config) for config in configs]
        if other := dict.fromkeys(name for one, mine in zip(exported, now) for name in one.other_hardware(mine)):
            raise ValueError(f"these are of an array for another {', '.join(other)} than the model's")
        for key, base, what in (("base_weights", True, "other weights"), ("weights", False, "another calibration")):
            if about.get(key) != (mine := weights_digest(model, base)):
                raise ValueError(
                    f"these were exported from {what} than the model's (digest {shown(str(about.get(key))[:12])}, "
                    f"the model's is {mine[:12]!r})"
                )

    # Conductances

    def array(self, name: str, layer: CrossbarLayer) -> Tensor:
        """A layer's conductances [µS], (2, rows, columns of a group, pairs).

        Raises:
            ValueError: of other shapes, impossible ones, not what the folder says that they are, or others than when
                they were read before.
        """
        name = self._arrays[name]
        rows, there = Rows.of(layer), files_there(self.folder, name, layer)
        rows = Rows(*(t.cpu() for t in rows))
        found = []
        if there["safetensors"]:
            found.append(read_safetensors(self.folder / file_name(name, "safetensors"), layer, rows))
        if there["csv"] or (found and any(some_there(self.folder, name, layer))):
            found.append(read_csv(self.folder, name, layer, rows))
        if len(found) > 1 and not torch.equal(*found):
            raise ValueError(
                f"{self.folder}: the conductances of layer {name!r} in its CSV files are others than in its "
                "safetensors file: allowed is one of them, the one that was read from the array, or the same in both"
            )
        device = layer.crossbar.config.device
        g = self._from_zero(name, found[0], device) if self.origin == "measured" else found[0]
        refuse_impossible(name, g, device)
        first = name not in self._seen
        self._refuse_mistaken(name, digest_of(g))
        if g.numel():
            self._largest[name] = float(g.max()), device.g_max
        if first and self.origin == "measured":
            self._look_at_tiles(name, layer, g)
        return g

    def _from_zero(self, name: str, found: Tensor, device: DeviceConfig) -> Tensor:
        """With slightly negative conductances, as instruments read of cells that hardly conduct, at 0."""
        negative = found < 0
        count, lowest = int(negative.sum()), float(found.nan_to_num().min()) if found.numel() else 0.0
        if not count or count > max(1, NEGATIVE * found.numel()) or lowest < -NEGATIVE * device.g_range:
            return found
        self.negative[name] = count, lowest
        return found.masked_fill(negative, 0.0)

    @torch.no_grad()
    def _look_at_tiles(self, name: str, layer: CrossbarLayer, found: Tensor) -> None:
        """Which tiles are as they were exported, and which hold what their cells hardly may by now."""
        config, was = layer.crossbar.config, self._exported
        programmed, rows = held_of(layer), Rows.of(layer)

        def cells(time: float | None, temperature: float | None, seed: int | None) -> Tensor:
            return to_array(layer, rows, list(cells_at(layer, programmed, time, temperature, seed))).cpu()

        targets = exported = cells(None, None, None)
        if was["seed"] is not None:
            heat = config.temperature if was["temperature"] is None else was["temperature"]
            exported = cells(was["time"], heat, derived_seed(was["seed"], self._chips[name]))
        error = weight_error(config.device, (self.time or 0.0,), self.temperature)
        for tile in range(layer.tiles()):
            there = (rows.tile == tile).cpu()
            g = found[:, there]
            self._not_read[name, tile] = is_as_exported(g, exported[:, there], config.device)
            likeness = Likeness.of(g, targets[:, there], config.device, error)
            if likeness and likeness.is_doubtful:
                self.unlike[name, tile] = likeness

    def refuse_wrong(self) -> None:
        """
        Raises:
            ValueError: of the layers that were read, all conductances are in another unit than µS, or tiles are, or
                tiles were not read but are as they were exported.
        """
        try:
            refuse_other_unit(self._largest.values())
            if same := [tile for tile, is_same in self._not_read.items() if is_same]:
                raise ValueError(
                    f"{len(same)} of {len(self._not_read)} tiles are said to be measured, and are those that were "
                    f"exported, or more than {100 * SHARE:g} % of their cells are, within five digits: {_tiles(same)}: "
                    "allowed are those that were read from an array"
                )
            if units := [tile for tile, likeness in self.unlike.items() if likeness.other_unit]:
                raise ValueError(
                    f"conductances of {len(units)} tiles are far below those that they were programmed to, and "
                    f"otherwise alike: are these in {self.unlike[units[0]].other_unit}? {_tiles(units)}: allowed is µS"
                )
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def notes(self) -> list[str]:
        """What a reader of figures on these conductances has to know, of the layers that were read."""
        found = [f"{self}: {note}" for note in self._of_retention]
        if self.unlike:
            tiles = some(f"{_tiles([tile])} ({likeness})" for tile, likeness in self.unlike.items())
            found.append(
                f"{self} hardly holds what it was to hold in {len(self.unlike)} of {len(self._not_read)} tiles: "
                f"{tiles}: are rows, columns, polarities and unit those of the folder's README?"
            )
        for name, (count, lowest) in self.negative.items():
            found.append(
                f"{self}: {count} negative conductances of layer {name!r}, down to {lowest:g} µS, are taken as 0"
            )
        return found

    def _refuse_mistaken(self, name: str, digest: str) -> None:
        if self.origin != "measured" and digest != self._digests[name]:
            raise ValueError(
                f"{self.folder}: the conductances of layer {name!r} are no longer those that were exported: of what "
                f'was read from an array, "origin" in {ABOUT} is to be "measured", with time and temperature then'
            )
        if self._seen.setdefault(name, digest) != digest:
            raise ValueError(f"{self.folder}: the conductances of layer {name!r} changed while they were used")

    def chip(self, name: str, layer: CrossbarLayer) -> Chip:
        """A layer on these cells; see :meth:`array`."""
        found = self.array(name, layer).to(layer.weight.device)
        programmed = held_of(layer)
        return chip_of(layer, programmed, from_array(layer, programmed, Rows.of(layer), found))

    def digest(self, model: nn.Module) -> str:
        """SHA-256 of all conductances, which are read and looked at for it.

        Raises:
            ValueError: see :meth:`array` and :meth:`refuse_wrong`.
        """
        layers = crossbar_layers(model)
        for name in dict.fromkeys(self._arrays.values()):
            self.array(name, layers[name])
        self.refuse_wrong()
        return hashlib.sha256(json.dumps(sorted(self._seen.items())).encode()).hexdigest()

    def __str__(self) -> str:
        return in_words(self.origin, self.name, self.time, self.temperature)


def retention_notes(model: nn.Module, time: float | None, temperature: float | None) -> list[str]:
    """What is to be known of simulated cells' retention at a time [s] and temperature [K], by device."""
    found: dict[str, None] = {}
    states = crossbar_states(model)
    for state in states if time is not None else ():
        device, of = state.config.device, f" ({state.config.device.name})" if len(states) > 1 else ""
        told = device.unmeasured(time, state.config.temperature if temperature is None else temperature)
        found |= {f"{each}{of}": None for each in told.values()}
    return list(found)


def _tiles(tiles: Sequence[tuple[str, int]]) -> str:
    return some(f"tile {tile} of layer {name!r}" for name, tile in tiles)


def array_of(model: nn.Module) -> dict[str, str]:
    """For each layer the name of the one in whose files its cells are: itself, or of layers that share a weight and
    hold it alike, the first.

    Raises:
        ValueError: there are copies of layers beside them, whose cells are on no array.
    """
    layers = crossbar_layers(model)
    if beside := [name for layer, name in chip_names(model).items() if layer not in layers.values()]:
        raise ValueError(
            f"PEFT keeps copies of {len(beside)} layers beside those in use, which would be on no array: merge or "
            f"unload the adapters first: {some(map(repr, beside))}"
        )
    found = {}
    for same in arrays(layers):
        for name in same:
            found[name] = next(n for n in same if n == name or _alike(layers[n], layers[name]))
    return {name: found[name] for name in layers}


def _alike(one: CrossbarLayer, other: CrossbarLayer) -> bool:
    same = one.crossbar is other.crossbar and one._digital_class is other._digital_class
    return same and all(torch.equal(getattr(one, name), getattr(other, name)) for name in MAPPING)
