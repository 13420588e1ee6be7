"""One cell technology: its conductance window, I–V curve, retention, programming and read noise."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from .checks import number, plain, polynomial, read_json, refuse_deep, shown
from .relaxation import Relaxation, exactly, horner
from .retention import (
    LONGEST,
    EmpiricalRetention,
    GenericRetention,
    RetentionModel,
    equivalent_time,
    retention_from_dict,
    retention_to_dict,
)
from .temperature import parse_temperature
from .time import parse_time

logger = logging.get_logger(__name__)

CENTURY = parse_time("100y")  # [s]
ABSURD, ABSURD_IN_SIEMENS = 1e4, 10.0

# Beyond these [µS], [V] and [eV] a conductance, voltage or energy is taken to be in another unit, and beyond these
# shares of the window (of its current) an error for a mistake, as one of retention is beyond the whole window: all with
# a warning.
SMALLEST_G_MAX, LARGEST_G_MAX = 1e-2, 1e3
LARGEST_VOLTAGE, LINEAR = 10.0, 1e4  # [V]; a v0 from the second on is a straight I–V curve's
LARGEST_ENERGY = 20.0  # [eV]
MUCH, MUCH_READ_NOISE = 0.5, 0.2
TEMPLATE = "generic"  # the preset whose retention is taken where none is given


def preset_names() -> list[str]:
    """Names that :meth:`DeviceConfig.from_preset` knows."""
    folder = resources.files(__package__) / "presets"
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def _preset(name: str) -> dict:
    """A preset's JSON form."""
    return json.loads((resources.files(__package__) / "presets" / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class DeviceConfig:
    """A ReRAM cell technology. Conductances in µS, voltages in V, currents in µA, times in s, temperatures in K.

    Args:
        g_min, g_max: the conductance window that weights are mapped to.
        v0: curvature of the I–V curve, ``I = g v0 sinh(v/v0)``.
        read_voltage: the DAC's full-scale voltage at ``range_shrink = 1``.
        retention: by how much conductances change over time, a formula (see :mod:`hf_reram.device.retention`) or
            measured tables (:mod:`hf_reram.device.empirical`), as a model or its JSON form. None: that of the preset
            "generic", which is then among ``assumed``, with a warning.
        programming: coefficients of the programming error's standard deviation as a polynomial in the target
            conductance, lowest power first.
        read_noise: standard deviation of a column's current, drawn anew at each read.
        stuck_at_min, stuck_at_max: share of cells that stay at g_min or g_max whatever is programmed.
        levels: how many conductances, evenly spaced from g_min to g_max, a cell is programmed to; None: any.
        floor_at_zero: a cell below 0 µS, where a Gaussian error puts some, is at 0 µS. False: below, as the fits say
            and as version 1 of the config had it.
        activation_energy: eV, for temperature as equivalent time (Arrhenius); of tables that were measured at several
            temperatures only beyond these.
        reference_temperature: the temperature of the retention data, and the one that cells are at unless another is
            said.
        name, source, assumed: what it is, where its numbers come from, and which of them are not measured.

    Raises:
        ValueError: a value outside what is physically possible; names the field, the value and what is allowed.
    """

    g_min: float
    g_max: float
    v0: float = 0.25
    read_voltage: float = 0.2
    retention: RetentionModel = None  # type: ignore[assignment]  # only until it is filled in
    programming: tuple[float, ...] = (0.0,)
    read_noise: float = 0.0
    stuck_at_min: float = 0.0
    stuck_at_max: float = 0.0
    levels: int | None = None
    floor_at_zero: bool = True
    activation_energy: float = 1.0
    reference_temperature: float = 298.15
    name: str = "custom"
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        for f in fields(self):
            refuse_deep(f"device.{f.name}", getattr(self, f.name))
        put("g_min", number("device", "g_min", self.g_min, 0))
        put("g_max", number("device", "g_max", self.g_max, 0, exclusive=True))
        if self.g_max <= self.g_min:
            raise ValueError(f"device.g_max={self.g_max!r}: allowed is a conductance above g_min={self.g_min!r} µS")
        for name in ("v0", "read_voltage"):
            put(name, number("device", name, getattr(self, name), 0, exclusive=True))
        put(
            "reference_temperature",
            parse_temperature(self.reference_temperature, "device.reference_temperature"),
        )
        for name in ("read_noise", "activation_energy", "stuck_at_min", "stuck_at_max"):
            put(name, number("device", name, getattr(self, name), 0))
        if self.read_voltage / self.v0 > 20:
            raise ValueError(
                f"device.read_voltage={self.read_voltage!r}: allowed is at most 20 v0 = {20 * self.v0:g} V "
                "(sinh(20) is already 2.4e8)"
            )
        if self.stuck_at_min + self.stuck_at_max > 1:
            raise ValueError(
                f"device.stuck_at_min={self.stuck_at_min!r}, stuck_at_max={self.stuck_at_max!r}: "
                "allowed are shares that sum to at most 1"
            )
        levels = plain(self.levels)
        whole = isinstance(levels, int) and not isinstance(levels, bool)
        if levels is not None and not (whole and 2 <= levels <= 1 << 16):
            raise ValueError(f"device.levels={shown(levels)}: allowed is an integer from 2 to {1 << 16}, or None")
        put("levels", levels)
        if not isinstance(plain(self.floor_at_zero), bool):
            raise ValueError(f"device.floor_at_zero={shown(self.floor_at_zero)}: allowed is True or False")
        put("floor_at_zero", plain(self.floor_at_zero))
        put("programming", polynomial("device", "programming", self.programming))
        assumed = self.retention is None
        retention = retention_from_dict(_preset(TEMPLATE)["retention"] if assumed else self.retention)
        if isinstance(retention, GenericRetention):
            retention = dataclasses.replace(retention, g_min=self.g_min)
        put("retention", retention)
        self._check_errors()
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"device.{name}={shown(getattr(self, name))}: allowed is a text")
        known = {f.name for f in fields(self)}
        named = isinstance(self.assumed, (list, tuple)) and all(isinstance(name, str) for name in self.assumed)
        if not named or not set(self.assumed) <= known:
            raise ValueError(f"device.assumed={shown(self.assumed)}: allowed is a list of names out of {sorted(known)}")
        put("assumed", tuple(dict.fromkeys((*self.assumed, "retention"))) if assumed else tuple(self.assumed))
        if assumed:
            logger.warning_once(
                f"device {self.name!r} has no retention: it is taken to drift as the preset {TEMPLATE!r} does, which "
                "is assumed and not measured"
            )
        self._doubt()

    def _doubt(self) -> None:
        """Warn of values that are allowed, and hardly meant."""
        doubts = []
        if unit := self._other_unit():
            doubts.append(f"g_max={self.g_max:g} µS: conductances are in µS; are these in {unit}?")
        voltages = {name: getattr(self, name) for name in ("v0", "read_voltage")}
        if large := [f"{name}={value:g} V" for name, value in voltages.items() if LARGEST_VOLTAGE < value < LINEAR]:
            doubts.append(
                f"{', '.join(large)}: voltages are in V; {'is this' if len(large) == 1 else 'are these'} in mV?"
            )
        if self.activation_energy > LARGEST_ENERGY:
            doubts.append(f"activation_energy={self.activation_energy:g} eV: energies are in eV; is this in meV?")
        moments = self._retention_on_grid(getattr(self.retention, "times", (1.0, parse_time("10y"))))
        programming = f"programming={list(self.programming)!r}"
        retention = f"retention={shown(retention_to_dict(self.retention))}"
        spreads = [
            (programming, [self._on_grid(self.programming)], MUCH),
            (retention, [std for _, std in moments], 1.0),
        ]
        means = (f"{retention}: mean shift", [mean for mean, _ in moments], 1.0)
        for given, curves, share in (*spreads, means):
            error = max(max(map(abs, curve)) for curve in curves)
            if error > share * self.g_range:
                doubts.append(f"{given}: errors of up to {error:g} µS, of a window of {self.g_range:g} µS")
        for given, curves, _ in spreads:
            least = min(map(min, curves))
            if least < 0:
                doubts.append(f"{given}: a standard deviation of {least:g} µS within the window, taken as 0")
        full = self.g_range * self.read_voltage
        if self.read_noise > MUCH_READ_NOISE * full:
            doubts.append(
                f"read_noise={self.read_noise:g} µA, where a cell that is all on adds {full:g} µA to a column"
            )
        for doubt in doubts:
            logger.warning_once(f"device {self.name!r}: {doubt}")

    def _other_unit(self) -> str | None:
        """What the conductances seem to be in, if not in µS."""
        if self.g_max < SMALLEST_G_MAX:
            return "S"
        return "nS" if self.g_max > LARGEST_G_MAX else None

    def _on_grid(self, curve: tuple[float, ...]) -> list[float]:
        """A polynomial at conductances across the window."""
        return [horner(curve, g) for g in self._grid()]

    def _grid(self) -> list[float]:
        return [self.g_min + self.g_range * i / 16 for i in range(17)]

    def _retention_on_grid(self, times: Iterable[float]) -> list[tuple[list[float], list[float]]]:
        """Mean shifts and spreads, these as they stand, across the window: of tables at all of their own times, of
        formulas at those given."""
        if isinstance(self.retention, EmpiricalRetention):
            return self._moments_on_grid(changes for _, _, changes in self.retention.tables())
        curves = [self.retention.polynomials(time) for time in times]
        return [(self._on_grid(mean), self._on_grid(std)) for mean, std in curves]

    def _moments_on_grid(self, relaxations: Iterable[Relaxation]) -> list[tuple[list[float], list[float]]]:
        grid = torch.tensor(self._grid(), dtype=torch.float64, device="cpu")  # configs are made on "meta" too
        return [(mean.tolist(), std.tolist()) for mean, std in (changes.moments(grid) for changes in relaxations)]

    def _check_errors(self) -> None:
        """Errors of more than :data:`ABSURD` conductance windows would leave the range of float32 on their way; of far
        less, where conductances seem to be in siemens and errors are not."""
        unit = self._other_unit()
        most = (ABSURD_IN_SIEMENS if unit == "S" else ABSURD) * self.g_range
        times = getattr(self.retention, "times", ()) or (1.0, LONGEST)
        if getattr(self.retention, "extrapolate", False):
            times = (*times, LONGEST)
        curves = [("programming", self._on_grid(self.programming))]
        try:
            found = self._retention_on_grid(times)
            if isinstance(self.retention, EmpiricalRetention):  # its rates count beyond its tables alone
                kelvins = self.retention.temperatures
                found += self._moments_on_grid(self.retention.changes(CENTURY, kelvin) for kelvin in kelvins)
            curves += [("retention", curve) for moments in found for curve in moments]
        except (OverflowError, ZeroDivisionError) as error:
            raise ValueError(
                f"device.retention={shown(self.retention)}: coefficients in µS that no float holds ({error}): allowed "
                "are a g_ref and coefficients of the size of conductances"
            ) from error
        for name, curve in curves:
            errors = [abs(error) for error in curve]
            if not all(error <= most for error in errors):  # NaN is none
                raise ValueError(
                    f"device.{name}={shown(getattr(self, name))}: errors of up to {max(errors):g} µS, allowed are "
                    f"{most:g} µS ({most / self.g_range:g} times g_max - g_min)"
                    + (f"; conductances are in µS: is g_max={self.g_max:g} in {unit}?" if unit else "")
                )

    # Construction and JSON

    @classmethod
    def from_preset(cls, name: str) -> "DeviceConfig":
        """A published device by name.

        Raises:
            ValueError: no such preset.
        """
        if not isinstance(name, str) or name not in preset_names():
            raise ValueError(
                f"device={shown(name)} is no preset: allowed are {preset_names()}, a dict or a DeviceConfig"
            )
        return cls.from_dict(_preset(name))

    @classmethod
    def from_json(cls, path: str | Path) -> "DeviceConfig":
        """A device from a JSON file of this class's fields (the presets are such files).

        Raises:
            FileNotFoundError: no such file. ValueError: no valid JSON, or a field or value that is not allowed.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, data) -> "DeviceConfig":
        """A device from a dict of this class's fields.

        Raises:
            ValueError: not a dict, an unknown or missing field, or a value that is not allowed.
        """
        if not isinstance(data, dict):
            raise ValueError(
                f"device={shown(data)}: allowed is a preset name out of {preset_names()}, a dict of fields"
            )
        refuse_deep("device", data)
        known = {f.name for f in fields(cls)}
        if set(data) - known:
            raise ValueError(
                f"device has unknown fields {shown(sorted(set(data) - known))}: allowed are {sorted(known)}"
            )
        if not {"g_min", "g_max"} <= set(data):
            raise ValueError(f"device lacks the fields {sorted({'g_min', 'g_max'} - set(data))}")
        return cls(**data)

    @classmethod
    def fit(cls, retention=None, iv=None, bake=None, **options) -> "DeviceConfig":
        """A device from measurements: reads over time, I–V sweeps, and reads before and after heat, each a long table
        (a file, a pandas DataFrame or a mapping of columns).

        Rows that were skipped and what is not recommended are logged. These, what fits and the law in time are in the
        :class:`hf_reram.device.fit.Fit` that :func:`hf_reram.device.fit.fit_measurements` gives, which takes the same
        arguments and says what they are.

        Raises:
            ValueError: a table lacks a column or a unit, holds what cannot be in its unit, or too few cells.
        """
        from .fit import fit_measurements

        found = fit_measurements(retention, iv, bake, **options)
        for told in (*found.skipped, *found.notes):
            logger.warning("fit of device %r: %s", found.fields["name"], told)
        return cls.from_dict(found.fields)

    def to_dict(self) -> dict:
        """All fields as plain JSON values: a checkpoint holds these, never a preset's name alone."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["retention"] = retention_to_dict(self.retention)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    # Physics

    @property
    def g_range(self) -> float:
        """``g_max - g_min`` [µS]."""
        return self.g_max - self.g_min

    def conductance(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Target conductances of the differential pair, ``g± = g_min + Δg max(±w, 0)``.

        Args:
            w: normalized weights, any shape; values outside [-1, 1] saturate.

        Returns:
            ``(g_plus, g_minus)`` [µS], each of the shape of ``w``.
        """
        w = torch.as_tensor(w).clamp(-1, 1)
        return self.g_min + self.g_range * w.clamp(min=0), self.g_min + self.g_range * (-w).clamp(min=0)

    def equivalent_time(self, time: str | float, temperature: str | float | None = None) -> float:
        """Seconds at the reference temperature that age a cell like ``time`` at ``temperature`` [K] (default: the
        reference temperature)."""
        seconds = parse_time(time)
        if temperature is None:
            return seconds
        kelvin = parse_temperature(temperature)
        return equivalent_time(seconds, kelvin, self.activation_energy, self.reference_temperature)

    def relaxation(self, time: str | float, temperature: str | float | None = None) -> Relaxation:
        """By how much conductances have changed ``time`` after programming, at ``temperature`` [K] (default: the
        reference temperature)."""
        return self.retention.at(*self._aged(time, temperature))

    def retention_moments(
        self, g: Tensor | float, time: str | float, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean shift ``μ(g, t, T)`` and standard deviation ``σ(g, t, T) >= 0`` [µS] of cells programmed to ``g`` [µS],
        each of the shape of ``g``."""
        g = g if isinstance(g, Tensor) else torch.tensor(float(g), device="cpu")
        return self.relaxation(time, temperature).moments(g)

    def retention_mean(self, g: Tensor | float, time: str | float, temperature: float | None = None) -> Tensor:
        """The first of :meth:`retention_moments`."""
        return self.retention_moments(g, time, temperature)[0]

    def retention_std(self, g: Tensor | float, time: str | float, temperature: float | None = None) -> Tensor:
        """The second of :meth:`retention_moments`."""
        return self.retention_moments(g, time, temperature)[1]

    def programming_std(self, g: Tensor | float) -> Tensor:
        """Standard deviation [µS] of the programming error of cells programmed to ``g`` [µS]; shape of ``g``."""
        return exactly(self.programming, g).clamp_(min=0)

    def b(self, range_shrink: float = 1.0) -> float:
        """``b = read_voltage · range_shrink / v0``: how far into the sinh a full-scale input goes."""
        return self.read_voltage * range_shrink / self.v0

    def holds_at(self, time: str | float, temperature: str | float | None = None) -> bool:
        """Whether retention at this time is the last measured value, held."""
        return self.retention.holds_at(*self._aged(time, temperature))

    def extrapolates_at(self, time: str | float, temperature: str | float | None = None) -> bool:
        """Whether this time lies past the last measured one, and retention is what its trend or law makes of it."""
        return self.retention.extrapolates_at(*self._aged(time, temperature))

    def precedes(self, time: str | float, temperature: str | float | None = None) -> bool:
        """Whether this time lies before the first measured one, whose retention is taken for it."""
        return self.retention.precedes(*self._aged(time, temperature))

    def shifts_at(self, temperature: str | float | None = None) -> bool:
        """Whether this temperature (default: the reference temperature) lies outside those measured, so that retention
        is that of the nearest one, at the time that ages a cell as much there."""
        kelvin = self._kelvin(temperature)
        return self._nearest(kelvin) != kelvin

    def unmeasured(self, time: str | float, temperature: str | float | None = None) -> dict[str, str]:
        """In which ways retention at this time and temperature is not what was measured there: by a word for each, a
        sentence."""
        kelvin = self._kelvin(temperature)
        when = f"retention at {parse_time(time):g} s" + ("" if temperature is None else f", {kelvin:g} K")
        found = {}
        if self.holds_at(time, temperature):
            found["held"] = f"{when} is the last measured value, held"
        if self.extrapolates_at(time, temperature):
            found["extrapolated"] = f"{when} is extrapolated beyond what was measured"
        if self.precedes(time, temperature):
            found["before the first"] = f"{when} is the first measured value, of a later time"
        if self.shifts_at(temperature):
            energy = f"activation energy of {self.activation_energy:g} eV"
            energy += ", which is assumed" if "activation_energy" in self.assumed else ""
            found["other temperature"] = (
                f"retention at {kelvin:g} K is that of {self._nearest(kelvin):g} K at equivalent times, by an {energy}"
            )
        return found

    def _kelvin(self, temperature: str | float | None) -> float:
        return self.reference_temperature if temperature is None else parse_temperature(temperature)

    def _nearest(self, kelvin: float) -> float:
        """Of the temperatures that were measured, and all between them, the nearest."""
        measured = self.retention.temperatures or (self.reference_temperature,)
        return min(max(kelvin, measured[0]), measured[-1])

    def _aged(self, time: str | float, temperature: str | float | None) -> tuple[float, float]:
        """The time [s] and temperature [K] that retention is asked at. Between temperatures that were measured, those
        that are meant; else the nearest one that was, the reference temperature of formulas, and the time that ages a
        cell as much there."""
        kelvin, seconds = self._kelvin(temperature), parse_time(time)
        nearest = self._nearest(kelvin)
        if nearest != kelvin:
            seconds = equivalent_time(seconds, kelvin, self.activation_energy, nearest)
        return seconds, nearest
