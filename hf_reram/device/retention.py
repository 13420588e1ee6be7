"""How a programmed conductance relaxes, at any time.

:meth:`at` gives a model's :class:`~hf_reram.device.relaxation.Relaxation`. The Gaussian models are, at a fixed time, a
pair of polynomials in the conductance ``g`` [µS], of the mean shift and of the spread; :meth:`polynomials` gives their
coefficients [µS / µS^k], lowest power first. All that differs between them is how these depend on time. The empirical
one is of measured tables, and stands in :mod:`hf_reram.device.empirical`.
"""

import dataclasses
import itertools
import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .checks import flag, number, numbers, plain, polynomial, refuse_deep, shown
from .empirical import EmpiricalRetention
from .relaxation import Gaussian, Relaxation

LONGEST = 1e30  # s; equivalent times beyond are taken as this
BOLTZMANN = 8.617333262e-5  # eV/K, CODATA 2018

COEFFICIENTS = ("A", "s0", "s1", "s2")  # of the generic model

Polynomial = tuple[float, ...]


def equivalent_time(time: float, temperature: float, activation_energy: float, reference_temperature: float) -> float:
    """Time at the reference temperature that ages a cell as much: ``t exp(Ea/k (1/T_ref - 1/T))`` (Arrhenius).

    Args:
        time: seconds at ``temperature``.
        temperature, reference_temperature: K.
        activation_energy: eV.
    """
    exponent = activation_energy / BOLTZMANN * (1 / reference_temperature - 1 / temperature)
    return min(time * math.exp(min(exponent, 700.0)), LONGEST)


class GaussianRetention:
    """A model of two polynomials in the conductance; temperature is equivalent time to it."""

    temperatures: ClassVar[tuple[float, ...]] = ()

    def polynomials(self, time: float) -> tuple[Polynomial, Polynomial]:
        """Coefficients of mean shift and spread [µS / µS^k] at a time [s], lowest power first."""
        raise NotImplementedError

    def last_time(self) -> float | None:
        """The last time [s] that was measured; None where that is not known."""
        raise NotImplementedError

    def holds_at(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies past the last one measured, so that its value is held."""
        return False

    def extrapolates_at(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies past the last one measured, and the formula or trend goes on."""
        last = self.last_time()
        return last is not None and time > last and not self.holds_at(time)

    def at(self, time: float, temperature: float | None = None) -> Relaxation:
        """The changes after ``time`` [s] at the reference temperature; with a warning past the last one measured."""
        if self.extrapolates_at(time):
            warnings.warn(
                f"retention was measured up to {self.last_time():g} s; later times are extrapolated", stacklevel=3
            )
        return Gaussian(*self.polynomials(time))


@dataclass(frozen=True)
class TableRetention(GaussianRetention):
    """Polynomials fitted at a few times, interpolated linearly in log t (Wan et al., Nature 608, 504 (2022)).

    Args:
        times: seconds, ascending, at least 1 µs.
        std: for each time, coefficients [µS] of the spread in ``x = g / g_ref``, lowest power first.
        mean: the same for the mean shift, or None for none.
        g_ref: µS.
        extrapolate: beyond the last time continue the last segment's slope in log t; otherwise hold the last value
            and warn once. Before the first time its value is taken, with a warning too.
    """

    times: tuple[float, ...]
    std: tuple[Polynomial, ...]
    mean: tuple[Polynomial, ...] | None = None
    g_ref: float = 1.0
    extrapolate: bool = False

    def __post_init__(self):
        times = numbers("retention", "times", self.times, 1e-6)
        if any(b <= a for a, b in itertools.pairwise(times)):
            raise ValueError(f"retention.times={shown(self.times)}: allowed is a strictly ascending list of seconds")
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "g_ref", number("retention", "g_ref", self.g_ref, 0, exclusive=True))
        for name in ("std", "mean"):
            table = plain(getattr(self, name))
            if table is None and name == "mean":
                continue
            if not isinstance(table, (list, tuple)) or len(table) != len(times):
                raise ValueError(f"retention.{name}={shown(table)}: allowed is one list of coefficients per time")
            rows = tuple(polynomial("retention", name, row) for row in table)
            width = max(len(row) for row in rows)
            object.__setattr__(self, name, tuple(row + (0.0,) * (width - len(row)) for row in rows))
        object.__setattr__(self, "extrapolate", flag("retention", "extrapolate", self.extrapolate))

    def last_time(self) -> float:
        return self.times[-1]

    def holds_at(self, time: float, temperature: float | None = None) -> bool:
        return time > self.times[-1] and not self.extrapolate

    def precedes(self, time: float, temperature: float | None = None) -> bool:
        """Whether ``time`` lies before the first fit, whose value is taken for it."""
        return time < self.times[0]

    def polynomials(self, time: float) -> tuple[Polynomial, Polynomial]:
        if self.precedes(time):
            _warn_early(self.times[0])
        if self.holds_at(time):
            warnings.warn(
                f"retention was measured up to {self.times[-1]:g} s; its last value is held for later times "
                "(set retention.extrapolate=true to continue the trend in log t)",
                stacklevel=3,
            )
        return self._at(self.mean, time), self._at(self.std, time)

    def _at(self, table, time: float) -> Polynomial:
        if table is None:
            return (0.0,)
        last = len(self.times) - 1
        if last == 0 or time <= self.times[0]:
            row = table[0]
        elif self.holds_at(time):
            row = table[last]
        else:
            right = next((i for i, t in enumerate(self.times) if t >= time), last)
            t0, t1 = self.times[right - 1], self.times[right]
            mix = math.log(time / t0) / math.log(t1 / t0)
            row = [a + mix * (b - a) for a, b in zip(table[right - 1], table[right])]
        return tuple(c / self.g_ref**k for k, c in enumerate(row))


@dataclass(frozen=True)
class LogRetention(GaussianRetention):
    """``offset(g) + slope(g) ln t`` for mean shift and spread, t >= 1 s (Falcone et al., CMO/HfOx ReRAM); before, that
    after 1 s, with a warning.

    Each field but the last holds the coefficients [µS / µS^k] of a polynomial in ``g`` [µS], lowest power first.

    Args:
        measured_until: the last time [s] of the data that it was fitted to; None where that is not known.
    """

    std_offset: Polynomial
    std_slope: Polynomial
    mean_offset: Polynomial = (0.0,)
    mean_slope: Polynomial = (0.0,)
    measured_until: float | None = None

    def __post_init__(self):
        for field in fields(self)[:-1]:
            object.__setattr__(self, field.name, polynomial("retention", field.name, getattr(self, field.name)))
        object.__setattr__(self, "measured_until", _until(self.measured_until))

    def last_time(self) -> float | None:
        return self.measured_until

    def precedes(self, time: float, temperature: float | None = None) -> bool:
        return time < 1.0

    def polynomials(self, time: float) -> tuple[Polynomial, Polynomial]:
        if self.precedes(time):
            _warn_early(1.0)
        log = math.log(max(time, 1.0))
        return _line(self.mean_offset, self.mean_slope, log), _line(self.std_offset, self.std_slope, log)


@dataclass(frozen=True)
class GenericRetention(GaussianRetention):
    """``mean = -min(A ln(1 + t/tau), 1) (g - g_min)``, ``std = s0 + (s1 + s2 g) ln(1 + t/tau)``: every number the
    user's.

    Args:
        A: relative drift of the conductance above g_min per e-fold of time, until all of it is gone.
        tau: s.
        s0, s1: µS. s2: dimensionless; all of A and these are 0 where they are not given.
            Of these four the JSON form has to give one, so that a device without drift says so (``"A": 0``).
        g_min: µS, where the mean shift vanishes; filled in from the device.
        saturates: False lets the mean shift go beyond all of the conductance, as version 1 of the config did.
        measured_until: the last time [s] of the data that it was fitted to; None where that is not known.
    """

    A: float = 0.0
    tau: float = 1.0
    s0: float = 0.0
    s1: float = 0.0
    s2: float = 0.0
    g_min: float = 0.0
    saturates: bool = True
    measured_until: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "saturates", flag("retention", "saturates", self.saturates))
        object.__setattr__(self, "measured_until", _until(self.measured_until))
        for field in fields(self)[:-2]:
            exclusive = field.name == "tau"
            value = number("retention", field.name, getattr(self, field.name), 0, exclusive)
            object.__setattr__(self, field.name, value)

    def last_time(self) -> float | None:
        return self.measured_until

    def precedes(self, time: float, temperature: float | None = None) -> bool:
        return False

    def polynomials(self, time: float) -> tuple[Polynomial, Polynomial]:
        log = math.log1p(time / self.tau)
        gone = min(self.A * log, 1.0) if self.saturates else self.A * log
        mean = (gone * self.g_min, -gone)
        return mean, (self.s0 + self.s1 * log, self.s2 * log)


def _until(value: Any) -> float | None:
    return None if value is None else number("retention", "measured_until", value, 0, exclusive=True)


def _warn_early(first: float) -> None:
    warnings.warn(
        f"retention was measured from {first:g} s on; its first value is taken for earlier times too", stacklevel=4
    )


def _line(offset: Polynomial, slope: Polynomial, log: float) -> Polynomial:
    width = max(len(offset), len(slope))
    offset, slope = (c + (0.0,) * (width - len(c)) for c in (offset, slope))
    return tuple(a + b * log for a, b in zip(offset, slope))


RetentionModel = TableRetention | LogRetention | GenericRetention | EmpiricalRetention
RETENTION_TYPES: dict[str, Any] = {
    "empirical": EmpiricalRetention,
    "generic": GenericRetention,
    "log": LogRetention,
    "table": TableRetention,
}


def retention_from_dict(data) -> RetentionModel:
    """A retention model from its JSON form, ``{"type": "table" | "log" | "generic" | "empirical", ...}``.

    Raises:
        ValueError: unknown type or field, or a value that the model does not allow.
    """
    if isinstance(data, RetentionModel):
        return data
    refuse_deep("retention", data)
    if not isinstance(data, dict) or not isinstance(data.get("type"), str) or data["type"] not in RETENTION_TYPES:
        raise ValueError(
            f"retention={shown(data)}: allowed is an object whose 'type' is one of {sorted(RETENTION_TYPES)}"
        )
    cls: Any = RETENTION_TYPES[data["type"]]
    known = {f.name for f in fields(cls)}
    unknown = set(data) - known - {"type"}
    if unknown:
        raise ValueError(f"retention has unknown fields {shown(sorted(unknown))}: allowed are {sorted(known)}")
    required = {f.name for f in fields(cls) if f.default is dataclasses.MISSING}
    if required - set(data):
        raise ValueError(f"retention of type {data['type']!r} lacks the fields {sorted(required - set(data))}")
    if cls is GenericRetention and not set(COEFFICIENTS) & set(data):
        raise ValueError(
            f"retention={shown(data)} lacks all of the fields {list(COEFFICIENTS)}: allowed are some of them, the "
            "others are then 0; a device that does not drift says so with 'A': 0"
        )
    return cls(**{k: v for k, v in data.items() if k != "type"})


def retention_to_dict(model: RetentionModel) -> dict:
    """The JSON form of a retention model; the inverse of :func:`retention_from_dict`."""
    name = next(key for key, cls in RETENTION_TYPES.items() if type(model) is cls)

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    told = {f.name: plain(getattr(model, f.name)) for f in fields(model)}
    if told.get("measured_until", 0) is None:  # the form, and digests of it, from before there was this field
        del told["measured_until"]
    return {"type": name} | told
