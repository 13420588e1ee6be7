"""``hf-reram fit``."""

from pathlib import Path
from typing import Annotated

import typer

from ..device import DeviceConfig
from ..device.plot import plot_device
from ..evaluation.escape import one_line
from .output import say, show_json, writable


def fit(
    retention: Annotated[
        list[Path] | None,
        typer.Option(help="Table of reads over time: cell, time_s, conductance_uS, …; may be given again."),
    ] = None,
    iv: Annotated[Path | None, typer.Option(help="Table of sweeps: cell, voltage_V, current_uA.")] = None,
    bake: Annotated[
        list[Path] | None, typer.Option(help="As --retention, with temperature_C, of reads before and after heat.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The device's JSON file; beside it the plot.")] = Path("device.json"),
    model: Annotated[str, typer.Option(help="Of retention: empirical, table, log or generic.")] = "empirical",
    g_min: Annotated[float | None, typer.Option(help="µS; default by the cells.")] = None,
    g_max: Annotated[float | None, typer.Option(help="µS; default by the cells.")] = None,
    read_voltage: Annotated[float | None, typer.Option(help="V, of the DAC at full scale.")] = None,
    temperature: Annotated[str, typer.Option(help="Of tables without a column of it: K, or such as 25C.")] = "25C",
    name: Annotated[str | None, typer.Option(help="Of the device; default the file's.")] = None,
    source: Annotated[str, typer.Option(help="Where the numbers come from.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the device as JSON and nothing else.")] = False,
) -> None:
    """Fit a device to measurements: CSV, TSV or parquet, columns by name with their unit."""
    from ..device.fit import fit_measurements

    writable(out.parent)
    fields = {} if read_voltage is None else {"read_voltage": read_voltage}
    found = fit_measurements(
        retention or None,
        iv,
        bake or None,
        g_min=g_min,
        g_max=g_max,
        model=model,
        temperature=temperature,
        name=name or out.stem,
        source=source,
        **fields,
    )
    device = DeviceConfig.from_dict(found.fields)
    device.to_json(out)
    plot = plot_device(out.with_suffix(".png"), device, found)
    if as_json:
        show_json(device.to_dict())
        return
    for line in str(found).splitlines():
        say(one_line(line))
    say(f"Written: {out}, {plot}")
