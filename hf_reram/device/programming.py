"""One chip's cells: what each was programmed to, and how it is found later.

A cell draws two standard normal variates when the chip is made, one for its programming error and one for its
retention, and keeps them: at every time the same cell is found at the same quantile, so a chip ages along one
continuous curve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cell import DeviceConfig
from .seeds import derived_seed


@dataclass
class Cells:
    """One polarity of an array.

    Attributes:
        target: conductances aimed at [µS].
        programmed: conductances right after programming [µS]; what retention starts from.
        variate: each cell's standard normal retention variate.
        stuck: cells that never move, or None.
    """

    target: Tensor
    programmed: Tensor
    variate: Tensor
    stuck: Tensor | None

    def after(self, device: DeviceConfig, time: float | None, temperature: float | None) -> Tensor:
        """Conductances [µS] at ``time`` [s] after programming; None: right after programming, no relaxation.

        Changes are distributed as those of cells with this target, as published and measured. Their mean and variance
        are in closed form in :func:`hf_reram.device.moments.cell_moments`.
        """
        if time is None:
            return self.programmed
        changes = device.relaxation(time, temperature)
        moved = _floored(device, changes.found(self.target, self.programmed, self.variate))
        return moved if self.stuck is None else torch.where(self.stuck, self.programmed, moved)


class Draws:
    """A chip's random numbers: a stream each for retention, programming error and stuck cells, so that none of them
    depends on whether the others are switched on. Drawn on the CPU in float32: one seed is one chip on every machine.
    """

    def __init__(self, seed: int):
        self._retention = torch.Generator().manual_seed(seed)
        self._programming = torch.Generator().manual_seed(derived_seed(seed, "programming error"))
        self._stuck = torch.Generator().manual_seed(derived_seed(seed, "stuck cells"))

    def retention(self, like: Tensor) -> Tensor:
        """Standard normal variates."""
        return torch.empty(like.shape, dtype=torch.float32).normal_(generator=self._retention).to(like.device)

    def programming(self, like: Tensor) -> Tensor:
        """Standard normal variates."""
        return torch.empty(like.shape, dtype=torch.float32).normal_(generator=self._programming).to(like.device)

    def stuck(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.empty(like.shape, dtype=torch.float32).uniform_(generator=self._stuck).to(like.device)


def program(device: DeviceConfig, target: Tensor, draws: Draws) -> Cells:
    """Program cells to ``target`` [µS]: draws their retention variates, programming errors and stuck cells."""
    variate = draws.retention(target)
    programmed = target
    if any(device.programming):
        programmed = _floored(device, target + device.programming_std(target) * draws.programming(target))
    stuck = None
    if device.stuck_at_min or device.stuck_at_max:
        lot = draws.stuck(target)
        at_min, at_max = lot < device.stuck_at_min, lot > 1 - device.stuck_at_max
        programmed = programmed.masked_fill(at_min, device.g_min).masked_fill(at_max, device.g_max)
        stuck = at_min | at_max
    return Cells(target, programmed, variate, stuck)


def _floored(device: DeviceConfig, g: Tensor) -> Tensor:
    """No conductance is negative; in place."""
    return g.clamp_(min=0) if device.floor_at_zero else g
