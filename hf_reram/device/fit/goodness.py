"""How well a retention model tells the changes that were measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr

from ..relaxation import Quantiles, Relaxation
from .bands import Bands
from .reads import Read

# Beyond these a model misses the data: relative error of the spread; error of the mean in spreads; distance of
# distributions (Kolmogorov and Smirnov). All beyond what few cells make of them.
SPREAD, MEAN, DISTANCE = 0.10, 0.10, 0.05
QUARTERS = 4  # of the window, that distributions are compared in


@dataclass(frozen=True)
class Goodness:
    """Attributes:
    spread: root mean square over bands and reads of the relative error of the spread. mean: of the error of the
        mean shift, in spreads. distance: the largest between the distributions of the changes, over reads and
        quarters of the window. cells: how many the distance's quarter held.
    """

    spread: float
    mean: float
    distance: float
    cells: int

    @property
    def misses(self) -> str:
        """What it misses the data in; empty of a model that can be recommended."""
        found = missed_moments(self.spread, self.mean)
        if not self.distance <= DISTANCE + 1.36 / self.cells**0.5:
            found.append(f"its distribution by {self.distance:.3f} (Kolmogorov–Smirnov)")
        return ", ".join(found)


def missed_moments(spread: float, mean: float) -> list[str]:
    """In words, which of the errors of a spread, relative, and of a mean, in spreads, are too large."""
    found = []
    if not spread <= SPREAD:
        found.append(f"its spread is off by {100 * spread:.0f} %")
    if not mean <= MEAN:
        found.append(f"its mean by {mean:.2f} spreads")
    return found


def goodness(
    at: Callable[[Read | Bands], Relaxation], reads: Sequence[Read], of: Sequence[Bands], window: tuple[float, float]
) -> Goodness:
    """Of a model that gives its changes at a read's time and temperature.

    Args:
        at: the model. reads: what was measured. of: the same, by bands. window: g_min and g_max [µS].
    """
    spread, mean = [], []
    for band in of:
        shifts, stds = (moment.numpy() for moment in at(band).moments(torch.from_numpy(band.g)))
        spread.append((stds / band.std - 1) ** 2 - band.std_error**2)
        mean.append(((shifts - band.mean) ** 2 - band.mean_error**2) / band.std**2)
    worst, cells = 0.0, 1
    for read in reads:
        quarter = np.clip((read.g - window[0]) / (window[1] - window[0]) * QUARTERS, 0, QUARTERS - 1e-9).astype(int)
        below = probabilities(at(read), read.g, read.change)
        for i in range(QUARTERS):
            if (count := int((quarter == i).sum())) >= 20:
                found = distance(below[quarter == i])
                if found - 1.36 / count**0.5 > worst - 1.36 / cells**0.5 or cells == 1:
                    worst, cells = found, count
    return Goodness(
        max(float(np.concatenate(spread).mean()), 0.0) ** 0.5,
        max(float(np.concatenate(mean).mean()), 0.0) ** 0.5,
        worst,
        cells,
    )


def probabilities(changes: Relaxation, g: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The share of cells that a model has at no more than each cell's change; even from 0 to 1 where it is right."""
    if isinstance(changes, Quantiles):
        rows = changes.rows(torch.from_numpy(np.ascontiguousarray(g, dtype=np.float64))).numpy()
        found = np.empty(len(g))
        knots = changes.z.numpy()
        for i, row in enumerate(rows):
            place = np.searchsorted(row, change[i])
            low, high = max(place - 1, 0), min(place, len(row) - 1)
            gap = row[high] - row[low]
            share = (change[i] - row[low]) / gap if gap > 0 else 0.5
            found[i] = knots[low] + share * (knots[high] - knots[low])
        inside = ndtr(found)
        return np.where(change < rows[:, 0], 0.0, np.where(change > rows[:, -1], 1.0, inside))
    mean, std = (moment.numpy() for moment in changes.moments(torch.from_numpy(np.asarray(g, dtype=np.float64))))
    return ndtr((change - mean) / np.maximum(std, 1e-12))


def distance(probability: np.ndarray) -> float:
    """The largest distance of a distribution from the even one."""
    ordered, count = np.sort(probability), len(probability)
    steps = np.arange(count + 1) / count
    return float(max((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))
