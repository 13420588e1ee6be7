"""What bakes at several temperatures tell: whether one activation energy holds, and how well tables between two of them
tell a third."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..empirical import EmpiricalRetention
from ..retention import BOLTZMANN
from .bands import Bands
from .goodness import MEAN, SPREAD


@dataclass(frozen=True)
class Heat:
    """Attributes:
    left_out: for each temperature [K] between others, the relative error of the spread and the error of the mean in
        spreads (root mean squares over bands) of tables that were made without it.
    spread, mean: the same errors of one Arrhenius shift, fitted to all temperatures.
    energy: its activation energy [eV]; None where no series of times tells it.
    """

    left_out: dict[float, tuple[float, float]]
    spread: float
    mean: float
    energy: float | None

    @property
    def misses(self) -> str:
        """What one Arrhenius shift misses; empty where it can be recommended."""
        found = []
        if not self.spread <= SPREAD:
            found.append(f"its spread is off by {100 * self.spread:.0f} %")
        if not self.mean <= MEAN:
            found.append(f"its mean by {self.mean:.2f} spreads")
        return ", ".join(found)


def heat(retention: EmpiricalRetention, of: Sequence[Bands], rate: np.ndarray | None) -> Heat | None:
    """None with less than three temperatures.

    Args:
        of: bands of the read at each temperature that tells most, in ascending order. rate: µS² of variance per e-fold
            of time at the lowest temperature, by band; None where it is not known.
    """
    if len(of) < 3:
        return None
    left_out = {}
    for i in range(1, len(of) - 1):
        others = EmpiricalRetention(
            retention.g,
            retention.quantiles,
            tuple(one for one in retention.series if one.temperature != of[i].temperature),
            retention.law,
            retention.saturation,
        )
        time = min(max(of[i].time, *(one.times[0] for one in others.series)), *(one.times[-1] for one in others.series))
        changes = others.at(time if len(others.series[0].times) == 1 else of[i].time, of[i].temperature)
        mean, std = (moment.numpy() for moment in changes.moments(torch.from_numpy(of[i].g)))
        left_out[of[i].temperature] = _errors(of[i], mean, std)
    # With variance and mean linear in log t, and one shift of log t by the temperature, both are linear in 1/T.
    x = np.array([1 / band.temperature for band in of])
    variances, means = (np.array([value(band) for band in of]) for value in (lambda b: b.std**2, lambda b: b.mean))
    slopes, found = [], []
    for values, errors in (
        (variances, np.array([2 * b.std**2 * b.std_error for b in of])),
        (means, np.array([b.mean_error for b in of])),
    ):
        lines = [np.polyfit(x - x.mean(), y, 1, w=1 / e) for y, e in zip(values.T, errors.T)]
        slopes.append(np.array([line[0] for line in lines]))
        found.append(np.array([np.polyval(line, x - x.mean()) for line in lines]).T)
    off = [_errors(band, m, np.sqrt(np.maximum(v, 0))) for band, v, m in zip(of, *found)]
    spread, mean = (float(np.sqrt(np.mean(np.square([pair[i] for pair in off])))) for i in range(2))
    energy = None
    if rate is not None and len(rate) == len(slopes[0]) and (rate > 0).all():
        energy = float(np.median(-slopes[0] / rate)) * BOLTZMANN
    return Heat(left_out, spread, mean, energy)


def _errors(band: Bands, mean: np.ndarray, std: np.ndarray) -> tuple[float, float]:
    return (
        float(np.sqrt(((std / band.std - 1) ** 2).mean())),
        float(np.sqrt((((mean - band.mean) / band.std) ** 2).mean())),
    )
