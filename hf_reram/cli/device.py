"""``hf-reram device``."""

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..config import ReRAMConfig
from ..device import DeviceConfig, format_time, parse_time
from ..device.plot import plot_device, times_of
from ..device.temperature import parse_temperature
from ..tasks.flags import device_of
from .output import say, show_json, show_table

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the window


def device(
    name: Annotated[str, typer.Argument(help="Of a preset, or a JSON file.")],
    times: Annotated[
        str | None, typer.Option(help="Since programming, such as 1s,1d,10y; default by the device.")
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="K, or such as 85C; default the device's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write four small plots to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """What a device is: its window, I–V curve, and by how much conductances change."""
    found = ReRAMConfig(device=device_of(name)).device
    at = times_of(found) if times is None else [parse_time(time.strip()) for time in times.split(",")]
    kelvin = None if temperature is None else parse_temperature(temperature)
    rows = [_row(found, time, kelvin) for time in at]
    if plot is not None:
        plot_device(plot, found)
    if as_json:
        show_json(
            {
                "device": found.to_dict(),
                "temperature": kelvin or found.reference_temperature,
                "b": found.b(),
                "retention": [
                    {"time": time, "g": g, "mean": mean, "std": std, "known": known}
                    for time, (g, mean, std, known) in zip(at, rows)
                ],
            }
        )
        return
    say(f"{found.name}: {found.source or 'no source given'}")
    say(
        f"window {found.g_min:g} to {found.g_max:g} µS; read at {found.read_voltage:g} V, "
        f"v0 = {found.v0:g} V: b = {found.b():.3g}"
    )
    say(f"retention model {_kind(found)}; assumed, not measured: {', '.join(found.assumed) or 'nothing'}")
    head = ["time", *(f"{g:.3g} µS" for g in rows[0][0]), "known"]
    body = [
        [format_time(time), *(f"{m:+.3g} ± {s:.3g}" for m, s in zip(mean, std)), known]
        for time, (_, mean, std, known) in zip(at, rows)
    ]
    show_table(f"mean and spread of the change [µS] at {kelvin or found.reference_temperature:g} K", head, body)
    if plot is not None:
        say(f"Written: {plot}")


def _kind(found: DeviceConfig) -> str:
    retention = found.to_dict()["retention"]
    if retention["type"] != "empirical":
        return str(retention["type"])
    kelvins = ", ".join(f"{series['temperature']:g}" for series in retention["series"])
    return f"empirical (measured at {kelvins} K; beyond the last time: {retention['law'] or 'held'})"


def _row(found: DeviceConfig, time: float, kelvin: float | None) -> tuple[list[float], list[float], list[float], str]:
    """Conductances, means, spreads, and whether they are measured."""
    g = [found.g_min + share * found.g_range for share in SHARES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean, std = found.retention_moments(torch.tensor(g), time, kelvin)
    return g, mean.tolist(), std.tolist(), ", ".join(found.unmeasured(time, kelvin))
