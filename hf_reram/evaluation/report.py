"""What a robustness evaluation found, as JSON, as a table and as a plot."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ReRAMConfig
from ..device.checks import read_json, refuse_deep, shown
from ..device.temperature import parse_temperature
from ..device.time import format_time, parse_time
from ..model.array_files import ORIGINS, in_words
from .escape import escaped
from .fields import HEAT, LIST, METRICS, NUMBERS, OBJECT, OBJECTS, SEED, TEXT, TEXTS, TIME, fields_of, optional
from .files import write_whole
from .tables import arrays_table, at_kelvin, markdown, over_chips, places


@dataclass(frozen=True)
class Measurement:
    """One chip at one time and temperature.

    Attributes:
        time: s since programming. temperature: K; None for the device's reference temperature, and for what each part
            of a model deploys at by itself where these are several.
        seed: number of the chip. metrics: value by name.
    """

    time: float
    temperature: float | None
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class ArrayMeasurement:
    """The model on one array whose conductances were read: no chip that was simulated, and no part of any statistic.

    Attributes:
        name: of the array. origin: "measured"; or "simulated" or "targets", where nothing was measured.
        time: s since programming when they were read. temperature: K, then; both None where nothing says.
        conductances: a digest of them. metrics: value by name.
    """

    name: str
    origin: str
    time: float | None
    temperature: float | None
    conductances: str
    metrics: dict[str, float]

    def __str__(self) -> str:
        return in_words(self.origin, self.name, self.time, self.temperature)


@dataclass(frozen=True)
class Statistic:
    """Over chips: mean, standard deviation (n - 1), half width of the 95 % confidence interval of the mean
    (Student's t), and number of chips. One chip has no spread, so that the two are NaN; of none the mean is too."""

    mean: float
    std: float
    ci95: float
    chips: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Statistic":
        """Of the finite ones among a metric's values, one a chip."""
        from scipy.special import stdtrit

        values = [value for value in values if math.isfinite(value)]
        n = len(values)
        mean = float(np.mean(values)) if n else math.nan
        std = float(np.std(values, ddof=1)) if n > 1 else math.nan
        return cls(mean, std, float(stdtrit(n - 1, 0.975)) * std / n**0.5 if n > 1 else math.nan, n)

    def shown(self, decimals: int) -> str:
        """Mean ± standard deviation, the figure of a single chip, or a dash where there is none."""
        if not self.chips:
            return "–"
        mean = f"{self.mean:.{decimals}f}"
        return mean if self.chips == 1 else f"{mean} ± {self.std:.{decimals}f}"


@dataclass
class RobustnessReport:
    """See :func:`hf_reram.evaluate_robustness`.

    Attributes:
        measurements: every chip, time and temperature.
        digital, ideal: metrics of the digital model and of the ideal crossbar, or None.
        config: the ReRAMConfig in full; other_configs: those of further parts that were patched by themselves.
        summary: what is on crossbars. notes: what a reader must know.
        weights: :func:`hf_reram.model.digest.weights_digest` of the model that was measured.
        uncalled: crossbar layers that did not run in some of the evaluations: they were no chip.
        about: what the model card says beside numbers, see :class:`hf_reram.hub.about.About`.
        model_config: :func:`hf_reram.model.digest.settings_of` that model; empty in reports of older versions.
        arrays: the model on cells whose conductances were read from elsewhere, as back from a real array.

    Raises:
        ValueError: a chip was measured twice at the same time and temperature, or an array twice.
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
    model_config: dict[str, Any] = field(default_factory=dict)
    other_configs: list[dict[str, Any]] = field(default_factory=list)
    arrays: list[ArrayMeasurement] = field(default_factory=list)

    def __post_init__(self):
        count = Counter((m.time, m.temperature, m.seed) for m in self.measurements)
        if twice := [run for run, times in count.items() if times > 1]:
            time, kelvin, seed = twice[0]
            raise ValueError(
                f"chip {seed} was measured {count[twice[0]]} times after {format_time(time)}{at_kelvin(kelvin)}, which "
                "would count as several chips: allowed is one measurement"
            )
        read = Counter(array.conductances for array in self.arrays)
        if again := [str(array) for array in self.arrays if read[array.conductances] > 1]:
            raise ValueError(f"the same conductances are those of {', '.join(again)}: allowed is one of them")

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any chip has, in the order in which ``evaluate`` gave them."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.metrics))

    @property
    def times(self) -> list[float]:
        """Times since programming [s], ascending."""
        return sorted({m.time for m in self.measurements})

    @property
    def temperatures(self) -> list[float | None]:
        """Temperatures [K] in the order of evaluation."""
        return list(dict.fromkeys(m.temperature for m in self.measurements))

    @property
    def main_temperature(self) -> float | None:
        """The temperature [K] of figures that name none: None, the device's reference, where chips were evaluated
        there, else the first one evaluated."""
        found = self.temperatures
        return None if not found or None in found else found[0]

    def configs(self) -> list[ReRAMConfig]:
        """The ReRAMConfigs of all parts that were measured; none where the report does not say.

        Raises:
            ValueError: one that cannot be read.
        """
        return [ReRAMConfig.from_dict(config) for config in (self.config, *self.other_configs) if config]

    @property
    def own_temperature(self) -> float | None:
        """What a temperature of None is [K]; None where each part had its own, or the report does not say."""
        try:
            found = {config.kelvin for config in self.configs()}
        except ValueError:
            return None
        return found.pop() if len(found) == 1 else None

    def in_kelvins(self) -> "RobustnessReport":
        """The same with the device's reference temperature as a number, which tables and cards then show: for a model
        that is deployed at another one by itself."""
        own = self.own_temperature
        if own is None or None not in self.temperatures:
            return self
        there = [m for m in self.measurements if m.temperature is None]
        known = {(m.time, m.seed) for m in there}
        others = [m for m in self.measurements if m.temperature is not None]
        others = [m for m in others if m.temperature != own or (m.time, m.seed) not in known]
        return replace(self, measurements=[*(replace(m, temperature=own) for m in there), *others])

    def statistic(self, metric: str, time: str | float, temperature: str | float | None = None) -> Statistic:
        """The chips' statistic of one metric at one time, over those where it is finite; :meth:`left_out` names the
        others.

        Args:
            temperature: K, or a text such as "85C"; None takes :attr:`main_temperature`.

        Raises:
            ValueError: nothing was measured there.
        """
        kelvin = self.main_temperature if temperature is None else parse_temperature(temperature)
        if kelvin not in self.temperatures and None in self.temperatures and kelvin == self.own_temperature:
            kelvin = None
        if metric not in self.metrics or parse_time(time) not in self.times or kelvin not in self.temperatures:
            raise ValueError(
                f"nothing measured for metric={metric!r}, time={time!r}, temperature={temperature!r}: there are "
                f"metrics {self.metrics}, times {[format_time(t) for t in self.times]} "
                f"and temperatures {self.temperatures}"
            )
        return self.found(metric, parse_time(time), kelvin)

    def found(self, metric: str, time: float, temperature: float | None) -> Statistic:
        """As :meth:`statistic`, at just this temperature, and over no chips where nothing was measured."""
        there = [m.metrics for m in self.measurements if m.time == time and m.temperature == temperature]
        return Statistic.of(metrics[metric] for metrics in there if metric in metrics)

    def left_out(self) -> list[str]:
        """What statistics leave out, in words: what was measured and is NaN or infinite, and metrics that some chips
        do not have."""
        runs = [("the digital model", self.digital or {}), ("the ideal crossbar", self.ideal or {})]
        for m in self.measurements:
            heat = "" if m.temperature is None else f" and {m.temperature:g} K"
            runs.append((f"chip {m.seed} after {format_time(m.time)}{heat}", m.metrics))
        runs += [(str(array), array.metrics) for array in self.arrays]
        infinite = [
            f"{name} is {value} on {run}"
            for run, metrics in runs
            for name, value in metrics.items()
            if not math.isfinite(value)
        ]
        names = self.metrics
        return infinite + [
            f"{name} is missing on {run}" for run, metrics in runs[2:] for name in names if name not in metrics
        ]

    def sentences(self) -> list[str]:
        """The notes as sentences, which begin with a capital unless it is a metric's name."""
        found = [*self.metrics, *(self.digital or {}), *(self.ideal or {})]
        names = tuple(f"{name} is " for name in found)  # as left_out tells of them
        return [f"{note if note.startswith(names) else note[:1].upper() + note[1:]}." for note in self.notes]

    def array_sentence(self) -> str:
        """What a reader of :attr:`arrays` has to know; empty where there are none."""
        if not self.arrays:
            return ""
        unmeasured = [array.name for array in self.arrays if array.origin != "measured"]
        told = (
            "Arrays are the model on conductances that were read, each a single one and no part of the figures of "
            "simulated chips; their read noise and converters are simulated."
        )
        return told + (f" Nothing was measured of {', '.join(unmeasured)}." if unmeasured else "")

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the statistics beside the measurements."""
        table = [
            {"metric": metric, "time": time, "label": format_time(time), "temperature": kelvin}
            | asdict(self.found(metric, time, kelvin))
            for metric in self.metrics
            for kelvin in self.temperatures
            for time in self.times
        ]
        return _in_json({"version": 1, **asdict(self), "statistics": table})

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to ``path`` if given (whole or not at all)."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
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
            found["arrays"] = [_array(i, array) for i, array in enumerate(found.pop("arrays", ()))]
            return cls([_measurement(i, m) for i, m in enumerate(found.pop("measurements"))], **found)
        except ValueError as error:
            raise ValueError(f"{path} is no robustness report: {error}") from error

    def to_markdown(self, decimals: int | None = None) -> str:
        """A table: metrics by row, references and times by column, mean ± standard deviation over chips.

        Args:
            decimals: None takes 1 for percentages and 3 for what lies within ±1.
        """
        hot = len(self.temperatures) > 1
        head = ["metric", *(["temperature"] if hot else []), "digital", "ideal crossbar"]
        rows, cells = [], {}
        for metric in self.metrics:
            measured = [m.metrics[metric] for m in self.measurements if metric in m.metrics]
            n = places(measured) if decimals is None else decimals
            for kelvin in self.temperatures:
                row = [metric, *([f"{kelvin:g} K" if kelvin is not None else "reference"] if hot else [])]
                for reference in (self.digital, self.ideal):
                    row.append(f"{reference[metric]:.{n}f}" if reference and metric in reference else "–")
                for time in self.times:
                    s = self.found(metric, time, kelvin)
                    row.append(s.shown(n))
                    cells[f"{metric} after {format_time(time)}{at_kelvin(kelvin if hot else None)}"] = s
                rows.append(row)
        table = markdown([*head, *(format_time(t) for t in self.times)], rows)
        foot = [escaped(sentence) for sentence in self.sentences()]
        if cells:
            what = over_chips(cells, at_kelvin(None if hot else self.main_temperature))
            foot.insert(0, escaped(f"{what[:1].upper()}{what[1:]}."))
        if self.uncalled:
            silent = escaped(", ".join(self.uncalled))
            foot.append(f"Crossbar layers that were not called, and so were no chip: {silent}.")
        text = table + "\n" + " ".join(foot) + "\n"
        if not self.arrays:
            return text
        return f"{text}\n{arrays_table(self, decimals)}\n{escaped(self.array_sentence())}\n"

    def plot(
        self,
        path: str | Path,
        *others: "RobustnessReport",
        metric: str | None = None,
        labels: Sequence[str] | None = None,
        title: str | None = None,
        digital: Mapping[str, float] | None = None,
        control: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a PNG: the metric against time since programming, mean with the band of ± one standard deviation over
        chips, the digital model as a reference line, and each array whose conductances were read as a star.

        Args:
            others: more reports for the same plot. metric: None takes the first. labels: one a report.
            digital: metrics of the reference line; None takes this report's.
            control: metrics of a second one, of the digital model finetuned at the same budget; None draws none.

        Raises:
            ValueError: a report holds no measurements, or none of the metric; or not one label a report.
        """
        from .plot import plot_reports

        metric = metric or next(iter(self.metrics), "")
        lines = {"digital base": digital or self.digital or {}, "digital, finetuned": control or {}}
        return plot_reports(path, [self, *others], metric, labels, title, lines)


def _in_json(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity: null, and the texts "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_json(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _measurement(index: int, data: Any) -> Measurement:
    try:
        found = fields_of(data, {"time": TIME, "temperature": HEAT, "seed": SEED, "metrics": METRICS})
    except ValueError as error:
        raise ValueError(f"measurements[{index}]: {error}") from None
    return Measurement(**found)


def _array(index: int, data: Any) -> ArrayMeasurement:
    try:
        found = fields_of(data, ARRAY)
        if found["origin"] not in ORIGINS:
            raise ValueError(f"origin={shown(found['origin'])}: allowed is one of {sorted(ORIGINS)}")
    except ValueError as error:
        raise ValueError(f"arrays[{index}]: {error}") from None
    return ArrayMeasurement(**found)


ARRAY = {
    "name": TEXT,
    "origin": TEXT,
    "time": optional(TIME),
    "temperature": HEAT,
    "conductances": TEXT,
    "metrics": METRICS,
}
FIELDS = {
    "measurements": LIST,
    "digital": optional(NUMBERS),
    "ideal": optional(NUMBERS),
    "config": OBJECT,
    "summary": TEXT,
    "notes": TEXTS,
}
OPTIONAL = {"weights": TEXT, "about": OBJECT, "uncalled": TEXTS, "model_config": OBJECT, "other_configs": OBJECTS}
OPTIONAL |= {"arrays": LIST}
