"""Whether a tile's conductances were read at all, and are what cells that were programmed to it may hold by then."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..device.cell import DeviceConfig
from ..device.moments import Curve, WeightError
from ..nn.ops.reference import looked_up

# Cells are as exported where they are so within the rounding of five digits; a tile, where all of its cells are to the
# last bit, or more than a share of them, and more than a few, within rounding. A read with a spread of 1 % of the
# conductance has a cell there by chance in 1 of 250.
ROUNDING, SHARE, FEW = 5e-5, 0.1, 2

# What a tile holds is correlated with what it was to hold, and a multiple of it. Both are to be at least so much of
# what they are of the device's cells after the stated time, and the multiple at most the inverse of it, but for so many
# standard errors. Cells that programming, retention and defects have moved apart stay within, since that is in what is
# expected of them: after a day on hfox-neurram weights of normal distribution have a correlation of 0.97, a multiple of
# 0.98. With twice the device's spread these would be 0.90 and 0.98.
ALIKE, ERRORS = 0.5, 4.0

# A tile that holds less than this multiple, and is otherwise what it was to be, is in another unit.
UNIT = 0.01


def is_as_exported(found: Tensor, exported: Tensor, device: DeviceConfig) -> bool:
    """Whether a tile's conductances [µS] are those that were exported. Cells that were exported at g_min or 0 tell
    nothing: many of these are read as just that."""
    told = (exported != device.g_min) & (exported != 0)
    one, other = found[told].double(), exported[told].double()
    if torch.equal(one, other):
        return one.numel() > 0
    same = int(((one - other).abs() <= ROUNDING * other).sum())
    return same > max(FEW, SHARE * one.numel())


class Likeness(NamedTuple):
    """Of what a tile holds and what it was to hold, both less g- of each pair.

    Attributes:
        correlation: as they are, not less their means. slope: by how much what is held is a multiple of what was to be.
        least, most: that each is of the device's cells at that time, (correlation, slope), with errors and all.
        expected: the same without.
    """

    correlation: float
    slope: float
    least: tuple[float, float]
    most: float
    expected: tuple[float, float]

    @classmethod
    def of(cls, found: Tensor, targets: Tensor, device: DeviceConfig, error: WeightError) -> "Likeness | None":
        """Of a tile's conductances [µS], (2, ...), and their targets; None where these are the same in each pair.

        Args:
            error: of a pair of the device's cells at that time, whose weight is 1 at g_max.
        """
        held, aimed = (((plus - minus) / device.g_range).double().cpu().flatten() for plus, minus in (found, targets))
        power = float(aimed.square().sum())
        if not power:
            return None
        mean, variance = aimed + aimed.sign() * _at(error.means[0], aimed), _at(error.std, aimed).square()
        slope = float((aimed * mean).sum()) / power
        alike = slope * math.sqrt(power / max(float((mean.square() + variance).sum()), 1e-30))
        of_slope = math.sqrt(float((aimed.square() * variance).sum())) / power
        of_alike = math.sqrt(max(1 - alike**2, 0.0) * float(aimed.pow(4).sum())) / power
        return cls(
            correlation(held, aimed),
            float((aimed * held).sum()) / power,
            (ALIKE * alike - ERRORS * of_alike, ALIKE * slope - ERRORS * of_slope),
            slope / ALIKE + ERRORS * of_slope,
            (alike, slope),
        )

    @property
    def other_unit(self) -> str | None:
        """The unit that the tile is in, where it is not µS."""
        if self.correlation <= 0 or self.correlation < self.least[0] or self.expected[1] <= 0:
            return None
        share = self.slope / self.expected[1]
        return None if share >= UNIT else "mS" if share > UNIT**2 else "S"

    @property
    def is_doubtful(self) -> bool:
        """Whether it hardly is what the device's cells may hold by then."""
        return self.correlation < self.least[0] or not self.least[1] <= self.slope <= self.most

    def __str__(self) -> str:
        alike, slope = self.expected
        return f"correlation {self.correlation:.2f}, multiple {self.slope:.3g}; expected {alike:.2f}, {slope:.3g}"


def _at(curve: Curve, aimed: Tensor) -> Tensor:
    a = aimed.abs().clamp(max=1)
    return looked_up(curve.table(a), a)[0]


def correlation(found: Tensor, wanted: Tensor) -> float:
    """Of two tensors' elements as they are, not less their means; 1 where nothing was wanted but 0."""
    found, wanted = found.detach().double(), wanted.detach().double()
    powers = float(found.square().sum()), float(wanted.square().sum())
    if not all(powers):
        return float(powers[1] == 0)
    return float((found * wanted).sum()) / math.sqrt(powers[0] * powers[1])
