"""What an ADC makes of currents, by its full scale."""

from typing import Any

import torch
from torch import Tensor

from .ops import reference


def conversion_errors(
    current: Tensor, weights: Tensor, full_scales: list[Any], levels: int, noise: float = 0.0
) -> Tensor:
    """``Σ weights (current - its code)²`` of an ADC with each of these full scales, in double precision.

    Args:
        current: any shape. weights: broadcastable to it. full_scales: in its unit. levels: per sign. noise: standard
            deviation of the read noise that the ADC converts with the current, in the same unit.
    """
    read = current
    if noise:
        generator = torch.Generator().manual_seed(0)
        read = current + noise * torch.randn(current.shape, generator=generator).to(current)
    found = []
    for full_scale in full_scales:
        step = torch.as_tensor(full_scale / levels, dtype=current.dtype, device=current.device)
        error = (reference.quantize(read, step, levels, None) - current).square_()
        found.append((error * weights).sum(dtype=torch.float64))
    return torch.stack(found)
