"""Retention as it was measured: quantiles of the conductance's change by programmed conductance, time and temperature.

Between times the quantiles go straight in log t, between conductances in g; a mix of ascending rows ascends. Between
temperatures mean and shape go straight in 1/T, and so does the logarithm of the spread, which grows the faster the
hotter. Beyond the last time the shape stays that of the last one: its spread goes on as a stated law
has it, its mean linearly in log t.
"""

import bisect
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch

from .checks import number, numbers, plain, shown
from .laws import LAWS, progress, restored, transformed
from .relaxation import Quantiles, Relaxation
from .temperature import parse_temperature

LARGEST_TABLE = 1 << 20  # changes in all


@dataclass(frozen=True)
class Series:
    """What was measured at one temperature.

    Args:
        temperature: K.
        times: seconds, ascending, at least 1 µs.
        change: for each time and each conductance the quantiles of the change [µS], ascending: lists of numbers, or as
            they are kept and written, a text with a space between them.
        spread_rate: for each conductance, by how much what the law makes of the spread grows with its measure of log
            time; None where only the last value can be held.
        spread_rate_error: standard errors of these.
        mean_rate: µS per e-fold of time, for each conductance. mean_rate_error: standard errors of these.
    """

    temperature: float
    times: tuple[float, ...]
    change: tuple[tuple[str, ...], ...]
    spread_rate: tuple[float, ...] | None = None
    spread_rate_error: tuple[float, ...] | None = None
    mean_rate: tuple[float, ...] | None = None
    mean_rate_error: tuple[float, ...] | None = None

    tables: ClassVar[np.ndarray]  # (times, conductances, quantiles), the numbers in the texts of ``change``

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", parse_temperature(self.temperature, "retention.series.temperature"))
        put("times", numbers("retention.series", "times", self.times, 1e-6))
        if any(b <= a for a, b in itertools.pairwise(self.times)):
            raise ValueError(f"retention.series.times={shown(self.times)}: allowed are ascending seconds")
        for name in ("spread_rate", "mean_rate", "spread_rate_error", "mean_rate_error"):
            if getattr(self, name) is not None:
                least = 0.0 if name.endswith("error") else -math.inf
                put(name, numbers("retention.series", name, getattr(self, name), least))
        if (self.spread_rate is None) != (self.mean_rate is None):
            raise ValueError("retention.series lacks one of spread_rate and mean_rate: allowed are both or neither")
        tables = plain(self.change)
        if not isinstance(tables, (list, tuple)) or len(tables) != len(self.times):
            raise ValueError("retention.series.change: allowed is one table per time")
        parsed = []
        for table in tables:
            if not isinstance(table, (list, tuple)) or not table:
                raise ValueError(f"retention.series.change={shown(table)}: allowed is one row per conductance")
            parsed.append([_row(row) for row in table])
            if len({len(row) for row in parsed[0] + parsed[-1]}) > 1:
                raise ValueError("retention.series.change: allowed are rows of one length")
        put("change", tuple(tuple(" ".join(f"{value:.6g}" for value in row) for row in rows) for rows in parsed))
        put("tables", np.array(parsed, dtype=np.float64))


def _row(row: Any) -> tuple[float, ...]:
    if isinstance(row, str):
        try:
            row = [float(word) for word in row.split()]
        except ValueError:
            raise ValueError(
                f"retention.series.change={shown(row)}: allowed is a text of numbers with spaces between them"
            ) from None
    found = numbers("retention.series", "change", row)
    if any(b < a for a, b in itertools.pairwise(found)):
        raise ValueError(f"retention.series.change={shown(row)}: allowed are quantiles that ascend")
    return found


@dataclass(frozen=True)
class EmpiricalRetention:
    """Quantiles of the change of conductances.

    Args:
        g: programmed conductances of the tables' rows [µS], ascending, at least two. Beyond them the nearest row holds.
        quantiles: probabilities of their columns, ascending, at least two. Beyond them the nearest holds.
        series: what was measured, one for each temperature.
        law: how the spread goes on beyond the last time, one of :data:`hf_reram.device.laws.LAWS`; None: held.
        saturation: of the law "saturating": per e-fold of time.
        law_error: relative error of the spread per decade of time beyond, as times that were left out showed it.
    """

    g: tuple[float, ...]
    quantiles: tuple[float, ...]
    series: tuple[Series, ...]
    law: str | None = None
    saturation: float | None = None
    law_error: float | None = None

    z: ClassVar[np.ndarray]  # standard normal variates at the quantiles

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("g", "quantiles"):
            put(name, numbers("retention", name, getattr(self, name), 0.0))
            found = getattr(self, name)
            if len(found) < 2 or any(b <= a for a, b in itertools.pairwise(found)):
                raise ValueError(f"retention.{name}={shown(found)}: allowed are at least two numbers that ascend")
        if self.quantiles[0] <= 0 or self.quantiles[-1] >= 1:
            raise ValueError(
                f"retention.quantiles={shown(self.quantiles)}: allowed are probabilities above 0 and below 1"
            )
        given = plain(self.series)
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"retention.series={shown(given)}: allowed is a list of at least one series")
        series = tuple(sorted(map(_series, given), key=lambda one: one.temperature))
        if any(b.temperature <= a.temperature for a, b in itertools.pairwise(series)):
            raise ValueError("retention.series: allowed is one series for each temperature")
        shape, size = (len(self.g), len(self.quantiles)), 0
        for one in series:
            if one.tables.shape[1:] != shape:
                raise ValueError(
                    f"retention.series.change at {one.temperature:g} K has rows and columns {one.tables.shape[1:]}: "
                    f"allowed are {shape}, one for each of g and of quantiles"
                )
            for name in ("spread_rate", "spread_rate_error", "mean_rate", "mean_rate_error"):
                if getattr(one, name) is not None and len(getattr(one, name)) != len(self.g):
                    raise ValueError(f"retention.series.{name}: allowed is one number for each of g")
            size += one.tables.size
        if size > LARGEST_TABLE:
            raise ValueError(f"retention.series hold {size} changes: allowed are at most {LARGEST_TABLE}")
        put("series", series)
        law = plain(self.law)
        if law is not None and law not in LAWS:
            raise ValueError(f"retention.law={shown(law)}: allowed is None or one of {sorted(LAWS)}")
        if (law == "saturating") != (self.saturation is not None):
            raise ValueError("retention.saturation: allowed is a number with the law 'saturating', and only there")
        if self.saturation is not None:
            put("saturation", number("retention", "saturation", self.saturation, 0, exclusive=True))
        if self.law_error is not None:
            put("law_error", number("retention", "law_error", self.law_error, 0))
        put("z", torch.special.ndtri(torch.from_numpy(np.array(self.quantiles))).numpy())

    @property
    def temperatures(self) -> tuple[float, ...]:
        """K, ascending."""
        return tuple(one.temperature for one in self.series)

    def holds_at(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies past the last one measured about this temperature, so that its value is held."""
        return any(time > one.times[-1] and not self._goes_on(one) for one in self._about(temperature)[0])

    def extrapolates_at(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies past the last one measured about this temperature, and the law tells what is then."""
        return any(time > one.times[-1] and self._goes_on(one) for one in self._about(temperature)[0])

    def precedes(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies before the first one measured about this temperature, whose value is taken for it."""
        return any(time < one.times[0] for one in self._about(temperature)[0])

    def at(self, time: float, temperature: float | None = None) -> Relaxation:
        """The changes at one time [s] and temperature [K] within those measured; None for the lowest of them. With a
        warning where the nearest that was measured is taken for them, or they are extrapolated."""
        about, _ = self._about(temperature)
        if self.precedes(time, temperature):
            first = max(one.times[0] for one in about)
            warnings.warn(
                f"retention was measured from {first:g} s on; its first value is taken for earlier times too",
                stacklevel=3,
            )
        if self.holds_at(time, temperature):
            last = min(one.times[-1] for one in about if not self._goes_on(one))
            warnings.warn(
                f"retention was measured up to {last:g} s; its last value is held for later times", stacklevel=3
            )
        if self.extrapolates_at(time, temperature):
            last = min(one.times[-1] for one in about if self._goes_on(one))
            warnings.warn(f"retention was measured up to {last:g} s; later times are extrapolated", stacklevel=3)
        return self.changes(time, temperature)

    def changes(self, time: float, temperature: float | None = None) -> Quantiles:
        """The same without a warning."""
        about, share = self._about(temperature)
        tables = [self._table(one, time) for one in about]
        if len(tables) == 1:
            return self._quantiles(tables[0])
        table = tables[0] + share * (tables[1] - tables[0])
        (_, low), (_, high), (mean, std) = map(self._moments, (*tables, table))
        grown = np.maximum(low, 1e-12) ** (1 - share) * np.maximum(high, 1e-12) ** share
        return self._quantiles(_rescaled(table, mean, std, grown))

    def spread_error(self, time: float, temperature: float | None = None) -> np.ndarray:
        """Standard error [µS] of the spread at each of g that comes of the extrapolation; 0 within measured times."""
        about, share = self._about(temperature)
        found = [self._spread_error(one, time) for one in about]
        return found[0] if len(found) == 1 else (1 - share) * found[0] + share * found[1]

    def tables(self) -> list[tuple[float, float, Relaxation]]:
        """All that was measured: temperature [K], time [s] and changes."""
        return [
            (one.temperature, time, self._quantiles(table))
            for one in self.series
            for time, table in zip(one.times, one.tables)
        ]

    def _goes_on(self, one: Series) -> bool:
        return self.law is not None and one.spread_rate is not None

    def _about(self, temperature: float | None) -> tuple[Sequence[Series], float]:
        """The series at a temperature, or those next to it and the share of the second."""
        kelvins = self.temperatures
        kelvin = kelvins[0] if temperature is None else min(max(temperature, kelvins[0]), kelvins[-1])
        at = bisect.bisect_left(kelvins, kelvin)
        if kelvins[at] == kelvin:
            return self.series[at : at + 1], 0.0
        low, high = 1 / kelvins[at - 1], 1 / kelvins[at]
        return self.series[at - 1 : at + 1], (low - 1 / kelvin) / (low - high)

    def _quantiles(self, table: np.ndarray) -> Quantiles:
        return Quantiles(np.array(self.g), self.z, table)

    def _table(self, one: Series, time: float) -> np.ndarray:
        times, tables = one.times, one.tables
        if time <= times[0]:
            return tables[0]
        if time > times[-1]:
            return self._beyond(one, math.log(time / times[-1])) if self._goes_on(one) else tables[-1]
        right = bisect.bisect_left(times, time)
        share = math.log(time / times[right - 1]) / math.log(times[right] / times[right - 1])
        return tables[right - 1] + share * (tables[right] - tables[right - 1])

    def _beyond(self, one: Series, log: float) -> np.ndarray:
        """The last table, its spread as the law has it ``log`` e-folds of time later."""
        table = one.tables[-1]
        mean, std = self._moments(table)
        grown = self._spread(one, std, log, np.zeros_like(std))
        return np.array(one.mean_rate)[:, None] * log + _rescaled(table, mean, std, grown)

    def _spread(self, one: Series, std: np.ndarray, log: float, errors: np.ndarray | float) -> np.ndarray:
        assert self.law is not None and one.spread_rate is not None
        rate = np.array(one.spread_rate) + errors
        moved = rate * progress(self.law, log, self.saturation or 0.0)
        return restored(self.law, transformed(self.law, np.maximum(std, 1e-12)) + moved)

    def _spread_error(self, one: Series, time: float) -> np.ndarray:
        if time <= one.times[-1] or not self._goes_on(one):
            return np.zeros(len(self.g))
        log = math.log(time / one.times[-1])
        std = self._moments(one.tables[-1])[1]
        errors = np.array(one.spread_rate_error or np.zeros(len(self.g)))
        low, high = (self._spread(one, std, log, sign * errors) for sign in (-1, 1))
        of_law = (self.law_error or 0.0) * log / math.log(10) * self._spread(one, std, log, 0.0)
        return np.hypot((high - low) / 2, of_law)

    def _moments(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self._quantiles(table).moments(torch.from_numpy(np.array(self.g)))
        return mean.numpy(), std.numpy()


def _rescaled(table: np.ndarray, mean: np.ndarray, std: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """A table with another spread about the same means."""
    return mean[:, None] + (table - mean[:, None]) * (wanted / np.maximum(std, 1e-12))[:, None]


def _series(value: Any) -> Series:
    if isinstance(value, Series):
        return value
    known = {field.name for field in fields(Series)}
    if not isinstance(value, dict) or not {"temperature", "times", "change"} <= set(value) <= known:
        raise ValueError(
            f"retention.series={shown(value)}: allowed are objects with temperature, times and change, and others of "
            f"the fields {sorted(known)}"
        )
    return Series(**value)
