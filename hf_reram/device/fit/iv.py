"""The curvature of measured I–V sweeps: v0 of ``I = g v0 sinh(v / v0)``, by state and by sign of the voltage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

from .files import CELL, CURRENT, VOLTAGE, Source, find_column, read_table
from .formulas import CONFIDENCE
from .reads import LARGEST, SMALLEST, Skip

SMALLEST_V0, LARGEST_V0 = 0.005, 100.0  # V; a curve that is straighter has none
LARGEST_VOLTAGE, LARGEST_CURRENT = 20.0, 1e5  # V, µA
STATES = 4  # that cells are told apart in
FEWEST = 4  # readings of a sweep
MISSES = 0.05  # share of a sweep's largest current, beyond which a curve misses it
DIFFERS = 0.1  # relative


@dataclass(frozen=True)
class V0:
    """Attributes:
    value, low, high: V, and the ends of the confidence interval. misfit: root mean square of what the curve misses,
        in shares of each sweep's largest current. cells: how many. g: their mean conductance at small voltages [µS].
    """

    value: float
    low: float
    high: float
    misfit: float
    cells: int
    g: float


@dataclass(frozen=True)
class Curvature:
    """Attributes:
    v0: of all sweeps together. states: by conductance, the lowest first. positive, negative: of one sign of the
        voltage, None where there is none. asymmetry: the median over cells of |I(v)| / |I(-v)| at the largest voltage
        that both signs reach, None where only one is measured. skipped: rows.
    """

    v0: V0
    states: tuple[V0, ...]
    positive: V0 | None
    negative: V0 | None
    asymmetry: float | None
    skipped: tuple[Skip, ...]

    @property
    def misses(self) -> str:
        """What one odd sinh for all misses; empty where it can be recommended."""
        found = []
        if self.v0.misfit > MISSES:
            found.append(f"it is off by {100 * self.v0.misfit:.1f} % of the largest current")
        values = [state.value for state in self.states]
        if len(values) > 1 and max(values) > (1 + DIFFERS) * min(values):
            found.append(f"v0 depends on the state ({min(values):.3g} to {max(values):.3g} V)")
        if self.asymmetry is not None and abs(np.log(self.asymmetry)) > DIFFERS:
            found.append(f"currents of the two signs differ by a factor of {self.asymmetry:.3g}")
        if self.positive and self.negative:
            values = [self.positive.value, self.negative.value]
            if max(values) > (1 + DIFFERS) * min(values):
                found.append(f"v0 is {values[0]:.3g} V for positive and {values[1]:.3g} V for negative voltages")
        return ", ".join(found)


def fit_iv(source: Source) -> tuple[Curvature, list[tuple[np.ndarray, np.ndarray]]]:
    """v0 of sweeps, and the sweeps (voltages [V], currents [µA]).

    Raises:
        ValueError: a column or unit is missing, a number cannot be in its unit, or there are too few readings.
    """
    frame, owner = read_table(source)
    cell, voltage, current = (find_column(frame, column, owner) for column in (CELL, VOLTAGE, CURRENT))
    assert cell is not None and voltage is not None and current is not None
    for values, name, unit, most in (
        (voltage, "voltage", "V", LARGEST_VOLTAGE),
        (current, "current", "µA", LARGEST_CURRENT),
    ):
        finite = values[np.isfinite(values)]
        if len(finite) and (large := float(np.abs(finite).max())) > most:
            raise ValueError(
                f"{owner}: a {name} of {large:g} {unit}: allowed are up to {most:g} {unit}; is the column's unit right?"
            )
    skipped = []
    good = np.isfinite(voltage) & np.isfinite(current)
    if not good.all():
        skipped.append(Skip(owner, "a number is missing", tuple((np.flatnonzero(~good) + 1).tolist())))
    opposite = good & (voltage * current < 0) & (np.abs(current) > 0.01 * np.nanmax(np.abs(current), initial=0.0))
    if 2 * opposite.sum() > good.sum():
        raise ValueError(
            f"{owner}: {opposite.sum()} of {good.sum()} currents run against their voltages: allowed is a current of "
            "the voltage's sign; is that of one column inverted?"
        )
    if opposite.any():
        skipped.append(Skip(owner, "a current against its voltage", tuple((np.flatnonzero(opposite) + 1).tolist())))
        good &= ~opposite
    sweeps, rows = [], []
    used = np.flatnonzero(good & (voltage != 0))
    _, cells = np.unique(cell[used].astype(str), return_inverse=True)
    order = np.argsort(cells, kind="stable")
    for of in np.split(used[order], np.flatnonzero(np.diff(cells[order])) + 1):
        if len(np.unique(voltage[of])) < FEWEST:
            rows += (of + 1).tolist()
        else:
            sweeps.append((voltage[of], current[of]))
    if rows:
        skipped.append(Skip(owner, f"a cell with less than {FEWEST} voltages", tuple(rows)))
    if not sweeps:
        raise ValueError(f"{owner}: no cell was read at {FEWEST} voltages or more: allowed are sweeps")
    ratio = float(np.median(np.concatenate([np.abs(i / v) for v, i in sweeps])))
    if not SMALLEST <= ratio <= LARGEST:
        raise ValueError(
            f"{owner}: currents over voltages of {ratio:g} µS: allowed are {SMALLEST:g} to {LARGEST:g} µS; are the "
            "columns' units right?"
        )
    joint = _v0(sweeps)
    g = np.array([_conductance(v, i, joint.value) for v, i in sweeps])
    order = np.argsort(g)
    count = min(STATES, len(sweeps))
    states = tuple(_v0([sweeps[k] for k in part]) for part in np.array_split(order, count)) if count > 1 else ()
    sides = []
    for sign in (1, -1):
        half = [(v[v * sign > 0], i[v * sign > 0]) for v, i in sweeps]
        half = [(v, i) for v, i in half if len(np.unique(v)) >= 3]
        sides.append(_v0(half) if half else None)
    positive, negative = sides
    return Curvature(joint, states, positive, negative, _asymmetry(sweeps), tuple(skipped)), sweeps


def _v0(sweeps: Sequence[tuple[np.ndarray, np.ndarray]]) -> V0:
    """One v0 for all sweeps, each of which has a conductance of its own; by robust least squares of currents in shares
    of a sweep's largest."""
    v, i = (np.concatenate(part) for part in zip(*sweeps))
    of = np.repeat(np.arange(len(sweeps)), [len(voltages) for voltages, _ in sweeps])
    scale = np.array([float(np.abs(currents).max()) or 1.0 for _, currents in sweeps])[of]

    def conductances(v0: float) -> np.ndarray:
        curve = _curve(v, v0)
        return np.bincount(of, curve * i) / np.bincount(of, curve**2)

    def residuals(p: np.ndarray) -> np.ndarray:
        v0 = float(np.exp(p[0]))
        return (conductances(v0)[of] * _curve(v, v0) - i) / scale

    largest = max(float(np.abs(v).max()) for v, _ in sweeps)
    low = np.log(max(SMALLEST_V0, largest / 50))
    tries = [
        least_squares(
            residuals,
            [np.log(np.clip(start, np.exp(low) * 1.01, LARGEST_V0 * 0.99))],
            bounds=([low], [np.log(LARGEST_V0)]),
            loss="soft_l1",
            f_scale=0.02,
            xtol=1e-10,
        )
        for start in (largest / 5, largest)
    ]
    found = min(tries, key=lambda one: one.cost)
    off, free = residuals(found.x), max(len(v) - len(sweeps) - 1, 1)
    error = np.sqrt((off**2).sum() / free / max(float((found.jac**2).sum()), 1e-30))
    half = float(error) * student.ppf(0.5 + CONFIDENCE / 2, free)
    value = float(np.exp(found.x[0]))
    g = float(conductances(value).mean())
    misfit = float(np.sqrt((off**2).mean()))
    return V0(value, value * np.exp(-min(half, 50)), value * np.exp(min(half, 50)), misfit, len(sweeps), g)


def _curve(v: np.ndarray, v0: float) -> np.ndarray:
    return v0 * np.sinh(v / v0)


def _conductance(v: np.ndarray, i: np.ndarray, v0: float) -> float:
    """Of the sweep's curve [µS]."""
    curve = _curve(v, v0)
    return float((curve * i).sum() / (curve**2).sum())


def _asymmetry(sweeps: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    ratios = []
    for v, i in sweeps:
        if v.max() <= 0 or v.min() >= 0:
            continue
        edge = min(v.max(), -v.min())
        up, down = (abs(float(np.interp(x, *_sorted(v, i)))) for x in (edge, -edge))
        if up > 0 and down > 0:
            ratios.append(up / down)
    return float(np.median(ratios)) if ratios else None


def _sorted(v: np.ndarray, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places, inverse = np.unique(v, return_inverse=True)
    return places, np.bincount(inverse, i) / np.bincount(inverse)
