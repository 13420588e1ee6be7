"""Markdown tables of robustness reports."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..device.time import format_time
from .escape import escaped

if TYPE_CHECKING:
    from .report import RobustnessReport


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header line. Cells are texts, of which Markdown makes nothing else."""
    lines = [[escaped(cell) for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def places(values: Iterable[float]) -> int:
    """Decimals that show a metric well: 1 for percentages, 3 for what lies within ±1."""
    return 3 if max((abs(value) for value in values if math.isfinite(value)), default=0.0) <= 1 else 1


def metrics_table(
    reports: Mapping[str, "RobustnessReport"],
    time: str | float,
    digital: Mapping[str, float] | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """A row a metric (empty ``metrics``: all), a column a model, mean over chips at one time; ``digital`` are of the
    base."""
    first = next(iter(reports.values()))
    rows = []
    for metric in metrics or first.metrics:
        base = [digital.get(metric, math.nan)] if digital else []
        means = [report.statistic(metric, time).mean for report in reports.values()]
        n = places([*base, *means])
        rows.append([metric, *(f"{value:.{n}f}" for value in [*base, *means])])
    return markdown(["", *(["digital base"] if digital else []), *reports], rows)


def comparison_table(
    reports: Mapping[str, "RobustnessReport"],
    metric: str | None = None,
    digital: Mapping[str, float] | None = None,
) -> str:
    """The digital base (``digital``, its metrics) and a row a model: ideal crossbar, and mean ± standard deviation over
    chips at each time."""
    first = next(iter(reports.values()))
    metric = metric or first.metrics[0]
    n = places(report.statistic(metric, t).mean for report in reports.values() for t in report.times)
    rows = []
    if digital:
        rows.append(["digital base", "–", *[f"{digital.get(metric, math.nan):.{n}f}"] * len(first.times)])
    for label, report in reports.items():
        cells = [report.statistic(metric, t) for t in report.times]
        ideal = f"{report.ideal[metric]:.{n}f}" if report.ideal and metric in report.ideal else "–"
        rows.append([label, ideal, *(f"{s.mean:.{n}f} ± {s.std:.{n}f}" for s in cells)])
    return markdown(["", "ideal crossbar", *(format_time(t) for t in first.times)], rows)
