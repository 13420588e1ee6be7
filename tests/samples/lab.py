"""What a lab does with a folder of conductances, from what stands in it and NumPy alone."""

import csv
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

JSON = "conductances.json"


def about(folder: Path) -> dict:
    return json.loads((folder / JSON).read_text(encoding="utf-8"))


def say(folder: Path, **changes) -> None:
    """Change what the folder says of its conductances."""
    (folder / JSON).write_text(json.dumps({**about(folder), **changes}), encoding="utf-8")


def tiles_of(folder: Path, name: str, kind: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each tile where its rows are, (rows, 4): group, input channel, kernel element and copy; and g+ and g- [µS],
    (rows, columns, pairs)."""
    layers = about(folder)["layers"]
    entry = layers[layers[name]["array"]]
    found = []
    for tile, path in enumerate(entry["files"]["csv"]):
        with open(folder / path, newline="") as file:
            head, *lines = csv.reader(file)
        table = np.array(lines, dtype=np.float64)
        assert head[:4] == ["group", "input_channel", "kernel_element", "copy"] and head[4] == "column0_pair0_plus_uS"
        cells = table[:, 4:].reshape(len(table), entry["columns"], entry["pairs_per_weight"], 2)
        plus, minus = (cells[..., i].astype(np.float32).astype(np.float64) for i in (0, 1))
        if kind == "safetensors":
            tensors = load_file(folder / entry["files"]["safetensors"])
            plus, minus = (tensors[f"tile{tile}.{polarity}"].astype(np.float64) for polarity in ("plus", "minus"))
        found.append((table[:, :4].astype(int), plus, minus))
    return found


def read(folder: Path, name: str, x: np.ndarray, kind: str = "safetensors", image: bool = False) -> np.ndarray:
    """A layer's output, (vectors, output channels), from currents, for inputs (vectors, channels, kernel elements);
    ``image``: all are of one."""
    entry = about(folder)["layers"][name]
    drive, out = entry["input"], entry["output"]
    channels = entry["input_channels"]
    u = x.astype(np.float64) - np.broadcast_to(drive["offset"], channels)[:, None]
    u = u / np.broadcast_to(drive["scale"], channels)[:, None]
    if drive["kind"] == "per_token":
        span = np.abs(u).max(None if image else (1, 2), keepdims=True)
    else:
        span = np.full((1, 1, 1), drive["range"])
    u = np.clip(u / span, drive["lowest"], 1)
    if drive["dac_bits"]:
        u = np.round(u * drive["dac_levels"]) / drive["dac_levels"]
    volts, v0 = u * drive["full_scale_V"], entry["v0_V"]
    scale = np.array(out["weight_scale"])
    scale = scale if scale.ndim == 2 else np.broadcast_to(scale, entry["output_channels"])
    y = np.zeros((len(x), entry["output_channels"]))
    for tile, (rows, plus, minus) in enumerate(tiles_of(folder, name, kind)):
        for group in range(entry["groups"]):
            here = rows[:, 0] == group
            v = volts[:, rows[here, 1], rows[here, 2]]
            current = np.einsum("nr,rcp->ncp", v0 * np.sinh(v / v0), plus[here] - minus[here]).mean(2)
            if out["adc_bits"]:
                step = out["adc_full_scale_uA"] / out["adc_levels"]
                current = np.clip(np.round(current / step), -out["adc_levels"], out["adc_levels"]) * step
            columns = slice(group * entry["columns"], (group + 1) * entry["columns"])
            y[:, columns] += current * (scale[columns] if scale.ndim == 1 else scale[columns, tile])
    return y * out["per_uA"] * np.reshape(span, (-1, 1)) + out["bias"]


def measure(folder: Path, spread: float = 0.1, seed: int = 0, kind: str = "safetensors", **said) -> Path:
    """Program the folder's conductances and read them back, with errors [µS], in files of one kind; the others go."""
    generator = np.random.default_rng(seed)
    for path in folder.glob("*.safetensors" if kind == "csv" else "*.csv"):
        path.unlink()
    for path in folder.glob("*.safetensors"):
        read = {k: np.abs(g + spread * generator.standard_normal(g.shape)) for k, g in load_file(path).items()}
        save_file({name: g.astype(np.float32) for name, g in read.items()}, path)
    for path in folder.glob("*.csv"):
        with open(path, newline="") as file:
            head, *lines = csv.reader(file)
        for line in lines:
            line[4:] = [repr(abs(float(g) + spread * generator.standard_normal())) for g in line[4:]]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
    say(folder, **{"origin": "measured", "time": "1d", "temperature": 300.0, **said})
    return folder
