"""Markdown tables of robustness reports."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..device.time import format_time
from .escape import escaped

if TYPE_CHECKING:
    from .report import RobustnessReport, Statistic


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header line. Cells are texts, of which Markdown makes nothing else."""
    lines = [[escaped(cell) for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def arrays_table(report: "RobustnessReport", decimals: int | None = None) -> str:
    """A row an array whose conductances were read, a column a metric."""
    names = list(dict.fromkeys(name for array in report.arrays for name in array.metrics))
    digits = {
        name: places(a.metrics[name] for a in report.arrays if name in a.metrics) if decimals is None else decimals
        for name in names
    }
    rows = [
        [str(array), *(_figure(array.metrics.get(name, math.nan), digits[name]) for name in names)]
        for array in report.arrays
    ]
    return markdown(["array", *names], rows)


def places(values: Iterable[float]) -> int:
    """Decimals that show a metric well: 1 for percentages, 3 for what lies within ±1."""
    return 3 if max((abs(value) for value in values if math.isfinite(value)), default=0.0) <= 1 else 1


def at_kelvin(kelvin: float | None) -> str:
    """A temperature in words, to be put behind others; nothing for the device's reference."""
    return "" if kelvin is None else f" at {kelvin:g} K"


def over_chips(cells: Mapping[str, "Statistic"], where: str = "") -> str:
    """What stands in a table's cells, in words: over how many chips, and which of them over fewer.

    Args:
        cells: by what each is called. where: to be put behind the number of chips.
    """
    most = max((cell.chips for cell in cells.values()), default=0)
    words = {0: f"no finite figure of a chip{where}", 1: f"of a single chip{where}, so that there is no spread"}
    return words.get(most, f"mean ± standard deviation over {most} chips{where}") + over_fewer(cells)


def over_fewer(cells: Mapping[str, "Statistic"]) -> str:
    """Which of a table's cells are over fewer chips than others, in words to be put behind others; often nothing."""
    counts: dict[int, list[str]] = {}
    for name, cell in cells.items():
        counts.setdefault(cell.chips, []).append(name)
    fewer = sorted(counts, reverse=True)[1:]
    return "".join(f"; over {count or 'none'}: {', '.join(counts[count])}" for count in fewer)


def comparison_cells(reports: Mapping[str, "RobustnessReport"], metric: str) -> dict[str, "Statistic"]:
    """The cells of :func:`comparison_table`, by what each is called."""
    return {
        f"{metric} of {label} after {format_time(time)}": report.found(metric, time, report.main_temperature)
        for label, report in named(reports).items()
        for time in report.times
    }


def metrics_cells(
    reports: Mapping[str, "RobustnessReport"], time: float, metrics: Sequence[str] = ()
) -> dict[str, "Statistic"]:
    """The cells of :func:`metrics_table`, by what each is called."""
    return {
        f"{metric} of {label}": report.found(metric, time, report.main_temperature)
        for metric in metrics or next(iter(reports.values())).metrics
        for label, report in named(reports).items()
    }


def same_temperature(reports: Mapping[str, "RobustnessReport"]) -> str:
    """The temperature of all of several models' figures in words, where it is the same and not the reference."""
    found = {report.main_temperature for report in reports.values()}
    return at_kelvin(found.pop()) if len(found) == 1 else ""


def named(reports: Mapping[str, "RobustnessReport"]) -> Mapping[str, "RobustnessReport"]:
    """The reports by labels that name the temperature where it is not the same for all."""
    if len({report.main_temperature for report in reports.values()}) == 1:
        return reports
    return {f"{label}{at_kelvin(report.main_temperature)}": report for label, report in reports.items()}


def metrics_table(
    reports: Mapping[str, "RobustnessReport"],
    time: float,
    digital: Mapping[str, Mapping[str, float]] | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """A row a metric (empty ``metrics``: all), a column a model, mean over chips at one time; ``digital`` are digital
    models' metrics, by label."""
    first, reports = next(iter(reports.values())), named(reports)
    rows, digital = [], digital or {}
    for metric in metrics or first.metrics:
        base = [found.get(metric, math.nan) for found in digital.values()]
        means = [report.found(metric, time, report.main_temperature).mean for report in reports.values()]
        n = places([*base, *means])
        rows.append([metric, *(_figure(value, n) for value in [*base, *means])])
    return markdown(["", *digital, *reports], rows)


def _figure(value: float, decimals: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{decimals}f}"


def comparison_table(
    reports: Mapping[str, "RobustnessReport"],
    metric: str | None = None,
    digital: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """A row a digital model (``digital``, their metrics by label) and a row a model on crossbars: ideal, and mean ±
    standard deviation over chips at each time."""
    metric = metric or next(iter(reports.values())).metrics[0]
    times = sorted({time for report in reports.values() for time in report.times})
    n = places(cell.mean for cell in comparison_cells(reports, metric).values())
    rows = []
    for label, found in (digital or {}).items():
        rows.append([label, "–", *[_figure(found.get(metric, math.nan), n)] * len(times)])
    for label, report in named(reports).items():
        cells = [report.found(metric, time, report.main_temperature) for time in times]
        ideal = f"{report.ideal[metric]:.{n}f}" if report.ideal and metric in report.ideal else "–"
        rows.append([label, ideal, *(cell.shown(n) for cell in cells)])
    return markdown(["", "ideal crossbar", *(format_time(t) for t in times)], rows)
