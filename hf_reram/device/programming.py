"""One chip's cells: what each was programmed to, and how it is found later.

A cell draws two standard normal variates when the chip is made, one for its programming error and one for its
retention, and keeps them: at every time the same cell is found on the same side of the mean, so a chip ages along one
continuous curve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cell import DeviceConfig
from .retention import horner


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

        Spread and shift are those of the target, as published. As in the published fits the relaxed conductance is
        Gaussian: near g_min it may come out slightly negative, which the differential pair reads as what it is.
        """
        if time is None:
            return self.programmed
        mean, std = device.retention.polynomials(device.equivalent_time(time, temperature))
        moved = horner(std, self.target).clamp_(min=0).mul_(self.variate).add_(self.programmed)
        if any(mean):
            moved += horner(mean, self.target)
        return moved if self.stuck is None else torch.where(self.stuck, self.programmed, moved)


def program(device: DeviceConfig, target: Tensor, generator: torch.Generator) -> Cells:
    """Program cells to ``target`` [µS]: draws their programming errors, retention variates and stuck cells.

    The draws are made on the generator's device and in float32, so one seed is one chip on every machine.
    """

    def draw(fill) -> Tensor:
        tensor = torch.empty(target.shape, device=generator.device)
        return fill(tensor, generator=generator).to(target.device)

    variate = draw(Tensor.normal_)
    programmed = target
    if any(device.programming):
        programmed = target + device.programming_std(target) * draw(Tensor.normal_)
    stuck = None
    if device.stuck_at_min or device.stuck_at_max:
        lot = draw(Tensor.uniform_)
        at_min, at_max = lot < device.stuck_at_min, lot > 1 - device.stuck_at_max
        programmed = programmed.masked_fill(at_min, device.g_min).masked_fill(at_max, device.g_max)
        stuck = at_min | at_max
    return Cells(target, programmed, variate, stuck)
