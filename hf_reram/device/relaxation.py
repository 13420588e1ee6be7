"""By how much conductances have changed at one time and temperature: a distribution for each conductance.

What a cell draws once is a standard normal variate z, which it keeps. A retention model says at each time which change
belongs to it: ``μ(g) + σ(g) z`` where errors are Gaussian, the quantile of a measured table at the probability Φ(z)
where they are not.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20  # cells that are looked up at a time


class Relaxation(Protocol):
    """The change of conductances g [µS] at one time."""

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [µS] of the change of cells programmed to ``g`` [µS]; shape and dtype of it."""

    def found(self, target: Tensor, programmed: Tensor, variate: Tensor) -> Tensor:
        """Where cells are found [µS] that were aimed at ``target`` and hold ``programmed`` [µS], before any floor.

        Args:
            variate: each cell's standard normal variate; all of one shape.
        """

    def floored(self, g: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment [µS, µS²] of ``max(offset + change, -g)``: of cells that start ``offset`` beside
        their target g and end at no less than 0 µS.

        Args:
            g: (n,), float64. offset: µS, (n, m).
        """


def horner(coefficients, x):
    """``sum_k c_k x^k``, lowest power first; ``x`` a float or a tensor."""
    result = 0.0 * x + coefficients[-1]
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def exactly(coefficients: tuple[float, ...], g: Tensor | float) -> Tensor:
    """A polynomial of conductances, in their dtype: powers of a conductance cancel to more than float32 has."""
    g = g if isinstance(g, Tensor) else torch.tensor(float(g), device="cpu")
    return horner(coefficients, g.double()).to(g.dtype if g.is_floating_point() else torch.get_default_dtype())


@dataclass(frozen=True)
class Gaussian:
    """Normal variates whose mean and spread are polynomials in g, coefficients [µS / µS^k] with the lowest power
    first; a spread below 0 is taken as 0."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (0.0,)

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return exactly(self.mean, g), exactly(self.std, g).clamp_(min=0)

    def found(self, target: Tensor, programmed: Tensor, variate: Tensor) -> Tensor:
        mean, std = self.moments(target)
        return std.mul_(variate).add_(programmed).add_(mean)

    def floored(self, g: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """With X normal, ``E max(X + g, 0) = (mean + g) Φ(z) + std φ(z)`` and ``z = (mean + g) / std``."""
        mean, std = (moment[..., None] for moment in self.moments(g))
        mean, g = offset + mean, g[..., None]
        level = mean + g
        z = level / std.clamp(min=1e-300)
        below, density = torch.special.ndtr(-z), torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        # As what the floor adds, so that far above it nothing cancels.
        lift = std * density - level * below
        added = level * std * density - (level**2 + std**2) * below
        return mean + lift, mean**2 + std**2 + added - 2 * g * lift


class Quantiles:
    """Changes by conductance and quantile, straight lines between those of the table; beyond it, its edge.

    Args:
        g: conductances of the table's rows [µS], (rows,), ascending.
        z: standard normal variates of its columns, (columns,), ascending.
        change: µS, (rows, columns), each row ascending.
    """

    def __init__(self, g: np.ndarray, z: np.ndarray, change: np.ndarray):
        self.g, self.z, self.change = (torch.from_numpy(np.asarray(v, dtype=np.float64)) for v in (g, z, change))

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        at = self.rows(g.double().flatten().to(self.g.device))
        first, second = (sums[:, 0] for sums in self._above(at))
        std = (second - first**2).clamp(min=0).sqrt()
        kind = g.dtype if g.is_floating_point() else torch.get_default_dtype()
        return first.view(g.shape).to(g.device, kind), std.view(g.shape).to(g.device, kind)

    def found(self, target: Tensor, programmed: Tensor, variate: Tensor) -> Tensor:
        g, z, change = (t.to(target.device, torch.float32) for t in (self.g, self.z, self.change))
        found = programmed.clone().contiguous()
        aims, variates, flat = target.reshape(-1), variate.reshape(-1), found.view(-1)
        for start in range(0, flat.numel(), PIECE):
            piece = slice(start, start + PIECE)
            row, down = _between(g, aims[piece].float())
            column, along = _between(z, variates[piece].float())
            low, high = (torch.lerp(change[r, column], change[r, column + 1], along) for r in (row, row + 1))
            flat[piece] += torch.lerp(low, high, down)
        return found

    def floored(self, g: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of integrals of ``(a + b z)^k φ(z)`` from where the change meets the floor."""
        at = self.rows(g)
        firsts, seconds = self._above(at)
        floor = -g[:, None] - offset  # of the change
        column = (torch.searchsorted(at, floor, right=True) - 1).clamp(0, len(self.z) - 2)
        left, right = at.gather(1, column), at.gather(1, column + 1)
        share = ((floor - left) / (right - left).clamp(min=1e-300)).clamp(0, 1)
        z0, z1 = self.z[column], self.z[column + 1]
        meets = z0 + share * (z1 - z0)
        # Below all of the table, and above all of it, the whole of the normal distribution is on one side.
        meets = torch.where(floor <= at[:, :1], -torch.inf, torch.where(floor >= at[:, -1:], torch.inf, meets))
        slope = (right - left) / (z1 - z0)
        first, second = _segment(left - slope * z0, slope, meets.clamp(z0, z1), z1)
        first, second = first + firsts.gather(1, column + 1), second + seconds.gather(1, column + 1)
        first = torch.where(floor <= at[:, :1], firsts[:, :1], torch.where(floor >= at[:, -1:], 0.0, first))
        second = torch.where(floor <= at[:, :1], seconds[:, :1], torch.where(floor >= at[:, -1:], 0.0, second))
        above, below = torch.special.ndtr(-meets), torch.special.ndtr(meets)
        mean = offset * above + first - g[:, None] * below
        return mean, offset**2 * above + 2 * offset * first + second + g[:, None] ** 2 * below

    def rows(self, g: Tensor) -> Tensor:
        """Changes at the columns' quantiles, (n, columns), of conductances (n,)."""
        row, down = _between(self.g, g)
        return torch.lerp(self.change[row], self.change[row + 1], down[:, None])

    def _above(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """``∫ D φ`` and ``∫ D² φ`` from each column on, (n, columns), the first from all that lies before it too."""
        slope = torch.diff(at, dim=1) / torch.diff(self.z)
        found = []
        edges = torch.special.ndtr(-self.z[-1]), torch.special.ndtr(self.z[0])
        for power, part in enumerate(_segment(at[:, :-1] - slope * self.z[:-1], slope, self.z[:-1], self.z[1:]), 1):
            part = torch.cat((part, at[:, -1:] ** power * edges[0]), 1)
            sums = part.flip(1).cumsum(1).flip(1)
            sums[:, 0] += at[:, 0] ** power * edges[1]
            found.append(sums)
        return found[0], found[1]


def _between(places: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where values lie among ascending places: the index of the place before, and the share of the way to the next,
    from 0 to 1."""
    index = (torch.bucketize(at, places, right=True) - 1).clamp_(0, len(places) - 2)
    left = places[index]
    return index, ((at - left) / (places[index + 1] - left)).clamp_(0, 1)


def _segment(offset: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``∫ (a + b z) φ dz`` and ``∫ (a + b z)² φ dz`` from ``low`` to ``high``, both finite."""
    (p0, p1, p2), (q0, q1, q2) = _powers(low), _powers(high)
    first = offset * (p0 - q0) + slope * (p1 - q1)
    second = offset**2 * (p0 - q0) + 2 * offset * slope * (p1 - q1) + slope**2 * (p2 - q2)
    return first, second


def _powers(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``∫ z^k φ dz`` from z on, k = 0, 1, 2."""
    density, above = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(-z)
    return above, density, z * density + above
