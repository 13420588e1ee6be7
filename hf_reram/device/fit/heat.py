"""What bakes at several temperatures tell: whether one activation energy holds, and how well tables between two of them
tell a third."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..empirical import EmpiricalRetention
from ..relaxation import Relaxation
from ..retention import equivalent_time
from .bands import Bands
from .goodness import missed_moments

ENERGIES = np.geomspace(0.02, 5.0, 121)  # eV, that are tried


@dataclass(frozen=True)
class Heat:
    """Attributes:
    left_out: for each temperature [K] between others, the relative error of the spread and the error of the mean in
        spreads (root mean squares over bands) of tables that were made without it.
    spread, mean: the same errors of one Arrhenius shift, fitted to all temperatures.
    energy: its activation energy [eV]; None where no temperature's times tell it, and all that can be seen is whether
        variance and mean are straight in 1/T, as they then have to be.
    """

    left_out: dict[float, tuple[float, float]]
    spread: float
    mean: float
    energy: float | None

    @property
    def misses(self) -> str:
        """What one Arrhenius shift misses; empty where it does not."""
        return ", ".join(missed_moments(self.spread, self.mean))


def heat(retention: EmpiricalRetention, of: Sequence[Bands], reference: float) -> Heat | None:
    """None with less than three temperatures, or less than two beside a law in time.

    Args:
        of: bands of the last read at each temperature. reference: K, of the series with the most times.
    """
    left_out = {}
    for band in of[1:-1]:
        others = replace(retention, series=tuple(s for s in retention.series if s.temperature != band.temperature))
        left_out[band.temperature] = _errors(band, others.changes(band.time, band.temperature))
    of_reference = replace(retention, series=tuple(s for s in retention.series if s.temperature == reference))
    if of_reference.series[0].spread_rate is not None and len(of) > 1:
        tries = [(_shifted(of_reference, of, reference, float(energy)), float(energy)) for energy in ENERGIES]
        (spread, mean), energy = min(tries, key=lambda one: one[0][0] ** 2 + one[0][1] ** 2)
        return Heat(left_out, spread, mean, energy)
    if len(of) < 3:
        return None
    # With variance and mean linear in log t, and one shift of log t by the temperature, both are linear in 1/T.
    x = np.array([1 / band.temperature for band in of])
    x -= x.mean()
    found = []
    for values, errors in (
        ([b.std**2 for b in of], [2 * b.std**2 * b.std_error for b in of]),
        ([b.mean for b in of], [b.mean_error for b in of]),
    ):
        lines = [np.polyfit(x, y, 1, w=1 / e) for y, e in zip(np.array(values).T, np.array(errors).T)]
        found.append(np.array([np.polyval(line, x) for line in lines]).T)
    off = [_off(band, mean, np.sqrt(np.maximum(square, 0))) for band, square, mean in zip(of, *found)]
    return Heat(left_out, *_together(off), None)


def _shifted(
    of_reference: EmpiricalRetention, of: Sequence[Bands], reference: float, energy: float
) -> tuple[float, float]:
    """Errors over all other temperatures of the reference's tables at equivalent times."""
    others = [band for band in of if band.temperature != reference]
    times = [equivalent_time(band.time, band.temperature, energy, reference) for band in others]
    return _together([_errors(band, of_reference.changes(time)) for band, time in zip(others, times)])


def _errors(band: Bands, changes: Relaxation) -> tuple[float, float]:
    mean, std = (moment.numpy() for moment in changes.moments(torch.from_numpy(band.g)))
    return _off(band, mean, std)


def _off(band: Bands, mean: np.ndarray, std: np.ndarray) -> tuple[float, float]:
    return _root_mean_square(std / band.std - 1), _root_mean_square((mean - band.mean) / band.std)


def _together(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return _root_mean_square([spread for spread, _ in errors]), _root_mean_square([mean for _, mean in errors])


def _root_mean_square(values: Sequence[float] | np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
