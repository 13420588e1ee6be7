"""What a robustness evaluation found, as JSON, as a table and as a plot."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..device.checks import read_json, refuse_deep
from ..device.time import format_time, parse_time
from .escape import escaped
from .fields import HEAT, LIST, NUMBERS, OBJECT, SEED, TEXT, TEXTS, TIME, fields_of, optional
from .files import write_whole
from .tables import markdown, places


@dataclass(frozen=True)
class Measurement:
    """One chip at one time and temperature.

    Attributes:
        time: s since programming. temperature: K, None for the device's reference temperature.
        seed: number of the chip. metrics: value by name.
    """

    time: float
    temperature: float | None
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Statistic:
    """Over chips: mean, standard deviation (n - 1), half width of the 95 % confidence interval of the mean
    (Student's t), and number of chips."""

    mean: float
    std: float
    ci95: float
    chips: int


@dataclass
class RobustnessReport:
    """See :func:`hf_reram.evaluate_robustness`.

    Attributes:
        measurements: every chip, time and temperature.
        digital, ideal: metrics of the digital model and of the ideal crossbar, or None.
        config: the ReRAMConfig in full. summary: what is on crossbars. notes: what a reader must know.
        weights: :func:`hf_reram.model.digest.weights_digest` of the model that was measured.
        uncalled: crossbar layers that did not run in some of the evaluations: they were no chip.
        about: what the model card says beside numbers, see :class:`hf_reram.hub.about.About`.
    """

    measurements: list[Measurement]
    digital: dict[str, float] | None = None
    ideal: dict[str, float] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    notes: list[str] = field(default_factory=list)
    weights: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order in which ``evaluate`` gave them."""
        return list(self.measurements[0].metrics) if self.measurements else []

    @property
    def times(self) -> list[float]:
        """Times since programming [s], ascending."""
        return sorted({m.time for m in self.measurements})

    @property
    def temperatures(self) -> list[float | None]:
        """Temperatures [K] in the order of evaluation."""
        return list(dict.fromkeys(m.temperature for m in self.measurements))

    def statistic(self, metric: str, time: str | float, temperature: float | None = None) -> Statistic:
        """The chips' statistic of one metric at one time, over those where it is finite; :meth:`not_finite` names the
        others.

        Args:
            temperature: K; None takes the first one evaluated.

        Raises:
            ValueError: nothing was measured there.
        """
        from scipy.special import stdtrit

        if temperature is None and self.measurements:
            temperature = self.temperatures[0]
        seconds = parse_time(time)
        values = [
            m.metrics[metric]
            for m in self.measurements
            if m.time == seconds and m.temperature == temperature and metric in m.metrics
        ]
        if not values:
            raise ValueError(
                f"nothing measured for metric={metric!r}, time={time!r}, temperature={temperature!r}: there are "
                f"metrics {self.metrics}, times {[format_time(t) for t in self.times]} "
                f"and temperatures {self.temperatures}"
            )
        values = [value for value in values if math.isfinite(value)]
        if not values:
            return Statistic(math.nan, math.nan, math.nan, 0)
        n, std = len(values), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        half = float(stdtrit(n - 1, 0.975)) * std / n**0.5 if n > 1 else 0.0
        return Statistic(float(np.mean(values)), std, half, n)

    def not_finite(self) -> list[str]:
        """What was measured and is NaN or infinite, in words; statistics leave it out."""
        runs = [("the digital model", self.digital or {}), ("the ideal crossbar", self.ideal or {})]
        for m in self.measurements:
            heat = "" if m.temperature is None else f" and {m.temperature:g} K"
            runs.append((f"chip {m.seed} after {format_time(m.time)}{heat}", m.metrics))
        return [
            f"{name} is {value} on {run}"
            for run, metrics in runs
            for name, value in metrics.items()
            if not math.isfinite(value)
        ]

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the statistics beside the measurements."""
        table = [
            {"metric": metric, "time": time, "label": format_time(time), "temperature": kelvin}
            | asdict(self.statistic(metric, time, kelvin))
            for metric in self.metrics
            for kelvin in self.temperatures
            for time in self.times
        ]
        return {"version": 1, **asdict(self), "statistics": table}

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to ``path`` if given (whole or not at all)."""
        text = json.dumps(_without_nan(self.to_dict()), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> "RobustnessReport":
        """Read back what :meth:`to_json` wrote.

        Raises:
            ValueError: no such report.
        """
        try:
            data = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is no robustness report: {error}") from error
        return cls.from_dict(data, path)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str | Path = "this") -> "RobustnessReport":
        """The inverse of :meth:`to_dict`; ``path`` is for the error.

        Raises:
            ValueError: no such report.
        """
        try:
            refuse_deep("it", data)
            found = fields_of(data, FIELDS, OPTIONAL)
            measurements = [_measurement(i, m) for i, m in enumerate(found.pop("measurements"))]
        except ValueError as error:
            raise ValueError(f"{path} is no robustness report: {error}") from error
        return cls(measurements, **found)

    def to_markdown(self, decimals: int | None = None) -> str:
        """A table: metrics by row, references and times by column, mean ± standard deviation over chips.

        Args:
            decimals: None takes 1 for percentages and 3 for what lies within ±1.
        """
        hot = len(self.temperatures) > 1
        head = ["metric", *(["temperature"] if hot else []), "digital", "ideal crossbar"]
        rows = []
        for metric in self.metrics:
            measured = [m.metrics[metric] for m in self.measurements if metric in m.metrics]
            n = places(measured) if decimals is None else decimals
            for kelvin in self.temperatures:
                row = [metric, *([f"{kelvin:g} K" if kelvin is not None else "reference"] if hot else [])]
                for reference in (self.digital, self.ideal):
                    row.append(f"{reference[metric]:.{n}f}" if reference and metric in reference else "–")
                for time in self.times:
                    s = self.statistic(metric, time, kelvin)
                    row.append(f"{s.mean:.{n}f} ± {s.std:.{n}f}")
                rows.append(row)
        table = markdown([*head, *(format_time(t) for t in self.times)], rows)
        foot = [escaped(f"{n[:1].upper()}{n[1:]}.") for n in self.notes]
        if self.times:
            chips = self.statistic(self.metrics[0], self.times[0]).chips
            foot.insert(0, f"Mean ± standard deviation over {chips} chips.")
        if self.uncalled:
            silent = escaped(", ".join(self.uncalled))
            foot.append(f"Crossbar layers that were not called, and so were no chip: {silent}.")
        return table + "\n" + " ".join(foot) + "\n"

    def plot(
        self,
        path: str | Path,
        *others: "RobustnessReport",
        metric: str | None = None,
        labels: Sequence[str] | None = None,
        title: str | None = None,
        digital: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a PNG: the metric against time since programming, mean with the band of ± one standard deviation over
        chips, the digital model as a reference line.

        Args:
            others: more reports for the same plot. metric: None takes the first. labels: one a report.
            digital: metrics of the reference line; None takes this report's.
        """
        from .plot import plot_reports

        return plot_reports(path, [self, *others], metric or self.metrics[0], labels, title, digital or self.digital)


def _without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measurement(index: int, data: Any) -> Measurement:
    try:
        found = fields_of(data, {"time": TIME, "temperature": HEAT, "seed": SEED, "metrics": NUMBERS})
    except ValueError as error:
        raise ValueError(f"measurements[{index}]: {error}") from None
    return Measurement(**found)


FIELDS = {
    "measurements": LIST,
    "digital": optional(NUMBERS),
    "ideal": optional(NUMBERS),
    "config": OBJECT,
    "summary": TEXT,
    "notes": TEXTS,
}
OPTIONAL = {"weights": TEXT, "about": OBJECT, "uncalled": TEXTS}
