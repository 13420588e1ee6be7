"""The error of a weight on a pair of cells: mean and spread of all that befalls a cell between its target and its read.

One cell of each pair is always at g_min, so mean and variance of ``W(t) - W`` depend on ``a = |w|`` alone. With
``M(g)`` and ``V(g)`` the mean and variance of the conductance that is found where ``g`` was aimed at,

    m(a)  = w_scale/Δg · (M(g_min + Δg a) - M(g_min) - Δg a) · sign(w)
    s²(a) = (w_scale/Δg)² · (V(g_min + Δg a) + V(g_min))

Both are integrals (:func:`cell_moments`), taken at evenly spaced a once and interpolated: whatever a device does to its
cells, float32 gives them to a few parts in 10⁴ of their largest value, and no spread is negative.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cell import DeviceConfig
from .relaxation import Gaussian, Relaxation
from .retention import LogRetention

INTERVALS = 4096  # of a curve

# What befalls a cell between its target and its read, apart.
SOURCES = ("retention", "programming", "stuck cells")
INVISIBLE = 1e-9  # of w_scale: float32 weights do not know such a shift
_NODES, _WIDTH = 160, 8.0  # of the quadrature over programming errors, and how many of their spreads it reaches


class Curve:
    """A function of a in [0, 1]: its values at evenly spaced points, and straight lines between them.

    Attributes:
        values: (points,), float64; a single one for a constant.
        is_constant, is_zero, is_line: whether it is the same everywhere, 0 everywhere, a multiple of a. end: its last
            value. Python's own, since compiled code cannot ask a tensor.
    """

    def __init__(self, values: Tensor):
        values = values.double()
        largest, places = values.abs().max(), torch.arange(len(values), dtype=values.dtype, device=values.device)
        line = values[-1] * places / max(len(values) - 1, 1)
        self.is_constant = bool((values - values[0]).abs().max() <= 1e-7 * largest)
        self.is_zero = bool(largest == 0)
        self.is_line = bool((values - line).abs().max() <= 1e-6 * largest)
        self.end = float(values[-1])
        self.values = values[:1] if self.is_constant else values
        self._tables: dict[tuple[str, torch.dtype], Tensor] = {}

    def table(self, like: Tensor) -> Tensor:
        """What is looked up, (2, points), in dtype and on the device of ``like``: at each point the value, and the step
        to the next."""
        key = (str(like.device), like.dtype)
        found = self._tables.get(key)
        if found is None:
            steps = torch.diff(self.values, append=self.values[-1:])
            steps[-1:] = steps[-2:-1] if len(steps) > 1 else 0.0
            found = torch.stack((self.values, steps)).to(like.dtype).to(like.device, non_blocking=True)
            if not torch.compiler.is_compiling():
                with torch.inference_mode(False):  # training may follow
                    found = self._tables[key] = found.clone()
        return found


@dataclass(frozen=True, eq=False)
class WeightError:
    """Moments of the error of a weight ``a = |w| in [0, 1]`` with ``w_scale = 1``.

    Attributes:
        std: the root of s², which is averaged over the times. means: m at each time.
        levels: that the weight is rounded to before; None for any. Not an error of which moments are taken: it is known
            when the weight is programmed, and the ideal crossbar has it too.
        pairs: of cells, whose errors are independent and whose average the weight is; ``std`` is that of one.
    """

    std: Curve
    means: tuple[Curve, ...]
    levels: int | None = None
    pairs: int = 1

    @property
    def shifts(self) -> tuple[Curve, ...]:
        """The means that are not 0 throughout."""
        return tuple(mean for mean in self.means if not mean.is_zero)

    @property
    def mean_is_linear(self) -> bool:
        """Whether every m is proportional to the weight, so that its output error is a multiple of the output."""
        return all(mean.is_line for mean in self.means)

    @property
    def mean_square(self) -> float:
        """Mean over the times of the squared factor by which a linear m scales the weights."""
        return sum(mean.end**2 for mean in self.means) / len(self.means)

    def averaged(self, pairs: int) -> "WeightError":
        """The moments where each weight is the average of several cell pairs."""
        return self if pairs == 1 else replace(self, pairs=pairs)

    def spread(self, like: Tensor) -> Tensor:
        """Table of s, see :meth:`Curve.table`."""
        table = self.std.table(like)
        return table if self.pairs == 1 else table * self.pairs**-0.5


@lru_cache(maxsize=256)
def weight_error(device: DeviceConfig, times: tuple[float, ...], temperature: float | None) -> WeightError:
    """The moments for a device at one or several times.

    Args:
        times: s. temperature: K, None for the device's reference temperature.
    """
    a = torch.linspace(0, 1, INTERVALS + 1, dtype=torch.float64, device="cpu")  # models are also made on meta
    means, variances = [], []
    for time in times:
        mean, variance = cell_moments(device, device.g_min + device.g_range * a, time, temperature)
        mean = (mean - mean[0]) / device.g_range
        means.append(Curve(torch.zeros(1, device="cpu") if mean.abs().max() < INVISIBLE else mean))
        variances.append((variance + variance[0]) / device.g_range**2)
    return WeightError(Curve(torch.stack(variances).mean(0).sqrt()), tuple(means), device.levels)


def alone(device: DeviceConfig, source: str) -> DeviceConfig:
    """The device with one of :data:`SOURCES` alone; the floor at 0 µS stays."""
    none: dict[str, dict[str, Any]] = {
        "retention": {"retention": LogRetention((0.0,), (0.0,))},
        "programming": {"programming": (0.0,)},
        "stuck cells": {"stuck_at_min": 0.0, "stuck_at_max": 0.0},
    }
    others = [fields for name, fields in none.items() if name != source]
    return replace(device, **{name: value for fields in others for name, value in fields.items()})


def cell_moments(
    device: DeviceConfig, g: Tensor, time: float | None, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of cells whose target was ``g``: the mean of what is found less g [µS], and its variance [µS²], over programming
    error, retention, the floor at 0 µS and stuck cells; what :class:`hf_reram.device.programming.Cells` draw.

    Args:
        g: µS, any shape. time: s, None for right after programming. temperature: K, None for the reference temperature.

    Returns:
        Both of the shape of ``g``, float64.
    """
    shape, g = g.shape, g.double().flatten()
    changes: Relaxation = Gaussian() if time is None else device.relaxation(time, temperature)
    programmed = device.programming_std(g)
    if not device.floor_at_zero:
        moved, spread = changes.moments(g)
        mean, square = moved, moved**2 + spread**2 + programmed**2
    elif not programmed.any():
        mean, square = (moment[:, 0] for moment in changes.floored(g, torch.zeros_like(g)[:, None]))
    else:
        # What was programmed is floored before it moves: at 0 with a chance of its own, above with Gaussian density.
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(_NODES))
        low = (-g / programmed.clamp(min=1e-300)).clamp(-_WIDTH, _WIDTH)
        z = low[..., None] + (nodes + 1) / 2 * (_WIDTH - low)[..., None]
        density = weights / 2 * (_WIDTH - low)[..., None] * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        offset = (programmed[..., None] * z).clamp(min=-g[..., None])
        first, second = changes.floored(g, offset)
        empty = 1 - density.sum(-1)
        at_zero = changes.floored(g, -g[:, None])
        mean = (density * first).sum(-1) + empty * at_zero[0][:, 0]
        square = (density * second).sum(-1) + empty * at_zero[1][:, 0]
    stuck = ((device.stuck_at_min, device.g_min), (device.stuck_at_max, device.g_max))
    free = 1 - device.stuck_at_min - device.stuck_at_max
    mean = free * mean + sum(share * (at - g) for share, at in stuck)
    square = free * square + sum(share * (at - g) ** 2 for share, at in stuck)
    return mean.view(shape), (square - mean**2).clamp(min=0).view(shape)
