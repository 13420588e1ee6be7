"""Four small plots of a device, with the data over them that it was fitted to."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cell import DeviceConfig
from .iv import cell_current
from .time import format_time, parse_time

if TYPE_CHECKING:
    from .fit.result import Fit

# Okabe and Ito's palette, told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
USUAL_TIMES = ("1s", "1h", "1d", "10y")
USUAL_KELVINS = (300.0, 325.0, 350.0, 375.0, 400.0)
BANDS = 12  # of the data
SWEEPS = 12  # that are shown
CHIP = 4001  # places of a distribution


def plot_device(path: str | Path, device: DeviceConfig, fit: "Fit | None" = None) -> Path:
    """Write the PNG: I–V curve, spread and mean over conductance, distribution of the change, and temperature.

    Args:
        fit: that the device comes of, whose data are drawn as points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is held and what goes on stands in the table
        for draw, axes in zip((_curves, _moments, _distribution, _heat), figure.subplots(2, 2).flat):
            draw(axes, device, fit)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
    figure.suptitle(device.name.replace("$", r"\$"), fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path


def times_of(device: DeviceConfig) -> list[float]:
    """Seconds at which to show it: at most four of those that were measured at the reference temperature, or the usual
    ones, and ten years."""
    series = getattr(device.retention, "series", ())
    measured = [one.times for one in series if one.temperature == device.reference_temperature]
    times = list(measured[0]) if measured else list(getattr(device.retention, "times", ()))
    if not times:
        return [parse_time(time) for time in USUAL_TIMES]
    picked = sorted({round(place) for place in np.linspace(0, len(times) - 1, min(len(times), 4))})
    return [times[i] for i in picked] + [parse_time("10y")] * (times[-1] < parse_time("10y"))


def _curves(axes: Any, device: DeviceConfig, fit: "Fit | None") -> None:
    """Current over voltage, in shares of the conductance: one curve for all states."""
    sweeps = fit.sweeps if fit is not None else ()
    edge = max([device.read_voltage, *(float(np.abs(v).max()) for v, _ in sweeps)])
    v = torch.linspace(-edge, edge, 201)
    axes.plot(v, cell_current(1.0, v, device.v0), color=COLORS[0], label=f"v0 sinh(v / v0), v0 = {device.v0:g} V")
    axes.plot(v, v, color="0.5", ls=":", lw=1, label="ohmic")
    for voltages, currents in sweeps[:: max(1, len(sweeps) // SWEEPS)]:
        curve = cell_current(1.0, torch.from_numpy(voltages), device.v0).numpy()
        g = float((curve * currents).sum() / (curve**2).sum())
        axes.plot(voltages, currents / g, ".", ms=2, color=COLORS[1], alpha=0.5)
    axes.set_xlabel("voltage [V]")
    axes.set_ylabel("current / conductance [V]")


def _moments(axes: Any, device: DeviceConfig, fit: "Fit | None") -> None:
    """Spread (full) and mean (dashed) of the change over the programmed conductance."""
    g = torch.linspace(device.g_min, device.g_max, 121, dtype=torch.float64)
    for i, time in enumerate(times_of(device)):
        mean, std = device.retention_moments(g, time)
        axes.plot(g, std, color=COLORS[i], label=format_time(time))
        axes.plot(g, mean, color=COLORS[i], ls="--", lw=1)
        for read in _reads(fit, device.reference_temperature, time):
            edges = np.quantile(read.g, np.linspace(0, 1, BANDS + 1))
            of = np.clip(np.searchsorted(edges, read.g, side="right") - 1, 0, BANDS - 1)
            groups = [read.change[of == k] for k in range(BANDS)]
            places = [read.g[of == k].mean() for k in range(BANDS)]
            axes.plot(places, [group.std() for group in groups], "o", ms=3, color=COLORS[i])
            axes.plot(places, [group.mean() for group in groups], "o", ms=3, mfc="none", color=COLORS[i])
    axes.set_xlabel("programmed conductance [µS]")
    axes.set_ylabel("spread, mean (dashed) [µS]")


def _distribution(axes: Any, device: DeviceConfig, fit: "Fit | None") -> None:
    """The share of cells in the middle of the window that change by no more than so much."""
    middle, margin = device.g_min + device.g_range / 2, device.g_range / 16
    share = (np.arange(CHIP) + 0.5) / CHIP
    z = torch.special.ndtri(torch.from_numpy(share))
    target = torch.full((CHIP,), middle, dtype=torch.float64)
    for i, time in enumerate(times_of(device)):
        change = device.relaxation(time).found(target, torch.zeros_like(target), z)
        axes.plot(change, share, color=COLORS[i], label=format_time(time))
        for read in _reads(fit, device.reference_temperature, time):
            found = np.sort(read.change[np.abs(read.g - middle) < margin])
            some = np.unique(np.linspace(0, len(found) - 1, 60).astype(int)) if len(found) else np.arange(0)
            axes.plot(found[some], (some + 0.5) / max(len(found), 1), "o", ms=2.5, color=COLORS[i])
    axes.set_xlabel(f"change of cells of {middle:.3g} µS [µS]")
    axes.set_ylabel("share of cells")


def _heat(axes: Any, device: DeviceConfig, fit: "Fit | None") -> None:
    """Spread over temperature, of cells at three conductances."""
    measured = device.retention.temperatures
    kelvins = np.linspace(measured[0], measured[-1], 41) if len(measured) > 1 else np.array(USUAL_KELVINS)
    series = [s for s in getattr(device.retention, "series", ()) if s.temperature == measured[-1]]
    time = series[0].times[-1] if len(measured) > 1 else parse_time("1h")
    for i, share in enumerate((0.1, 0.5, 0.9)):
        g = device.g_min + share * device.g_range
        spreads = [float(device.retention_std(g, time, float(kelvin))) for kelvin in kelvins]
        axes.plot(kelvins, spreads, color=COLORS[i], label=f"{g:.3g} µS, {format_time(round(time))}")
        for kelvin in measured if len(measured) > 1 else ():
            for read in _reads(fit, kelvin)[-1:]:
                near = read.change[np.abs(read.g - g) < device.g_range / 16]
                axes.plot([kelvin], [near.std()], "o", ms=4, color=COLORS[i])
    axes.set_xlabel("temperature [K]")
    axes.set_ylabel("spread [µS]")


def _reads(fit: "Fit | None", kelvin: float, time: float | None = None) -> list[Any]:
    reads = fit.reads if fit is not None else ()
    return [read for read in reads if read.temperature == kelvin and time in (None, read.time)]
