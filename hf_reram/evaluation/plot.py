"""The plot of a robustness evaluation: metric against time since programming."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..device.time import parse_time
from .escape import one_line

if TYPE_CHECKING:
    from .report import RobustnessReport

# Okabe and Ito's palette, told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
FIRST = 0.7  # s, where the axis begins, and what has no time or an earlier one stands
TICKS = ("1s", "1min", "1h", "1d", "1mo", "1y", "10y")


def plot_reports(
    path: str | Path,
    reports: Sequence["RobustnessReport"],
    metric: str,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    digital: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write the PNG; see :meth:`hf_reram.RobustnessReport.plot`. ``digital`` are metrics of reference lines, by label.

    Raises:
        ValueError: not one label per report, or a report without measurements of the metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if labels is None:
        labels = ["crossbar"] if len(reports) == 1 else [f"model {i + 1}" for i in range(len(reports))]
    if len(labels) != len(reports):
        raise ValueError(f"labels={list(labels)!r}: allowed are {len(reports)} labels, one per report")
    for report, label in zip(reports, labels):
        if metric not in report.metrics:
            raise ValueError(f"{label}: its report holds no measurements of {metric!r}: there are {report.metrics}")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (report, label) in enumerate(zip(reports, labels)):
        color = COLORS[i % len(COLORS)]
        times = [t for t in report.times if t > 0]
        for j, kelvin in enumerate(report.temperatures):
            statistics = [report.found(metric, t, kelvin) for t in times]
            mean = [s.mean for s in statistics]
            name = _plain(label) + ("" if kelvin is None else f", {kelvin:g} K")
            axes.plot(times, mean, color=color, marker=MARKERS[i % 7], ms=5, ls=("-", "--", ":")[j % 3], label=name)
            low, high = ([s.mean + sign * s.std for s in statistics] for sign in (-1, 1))
            axes.fill_between(times, low, high, color=color, alpha=0.15, lw=0)
        name = "" if len(reports) == 1 else f"{_plain(label)}, "
        for array in report.arrays:
            if metric in array.metrics:
                place = max(array.time or 0.0, FIRST)
                axes.plot(place, array.metrics[metric], "*", color=color, ms=13, mec="k", clip_on=False, ls="none")
                axes.annotate(
                    name + _plain(str(array)),
                    (place, array.metrics[metric]),
                    (0, 9),
                    textcoords="offset points",
                    ha="left" if place < 1e4 else "right",
                    fontsize=8,
                )
    for (label, found), dashes in zip((digital or {}).items(), ((5, 3), (1, 2))):
        if metric in found:
            axes.axhline(found[metric], color="0.35", ls=(0, dashes), lw=1.2, label=label)
    axes.set_xscale("log")
    last = max(max(report.times + [array.time or 0.0 for array in report.arrays]) for report in reports)
    axes.set_xlim(FIRST, max(last * 1.5, 2))
    ticks = [tick for tick in TICKS if parse_time(tick) <= max(last, 1) * 1.01]
    axes.set_xticks([parse_time(tick) for tick in ticks], ticks)
    axes.minorticks_off()
    axes.set_xlabel("time since programming")
    axes.set_ylabel(_plain(metric.removeprefix("eval_").replace("_", " ")))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    if title:
        axes.set_title(_plain(title), fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return one_line(text).replace("$", r"\$")
