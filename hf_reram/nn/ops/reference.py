"""What crossbars do under ``torch.compile``: the same mathematics in plain PyTorch, whose passes the compiler fuses,
and whose gradients it derives. In eager mode the functions of :mod:`.functional`, :mod:`.cells` and :mod:`.power`,
written for few passes, take their place."""

import torch
from torch import Tensor

from ...device.iv import LINEAR_B
from ...device.moments import WeightError
from ...device.retention import horner
from .random import white_noise_like


def shrunk_sinh(
    x: Tensor, span: Tensor | float, b: float, levels: int, gain: float, floor: float, coefficients: tuple[float, ...]
) -> Tensor:
    """As :class:`.functional.ShrunkSinh`, with :func:`hf_reram.device.iv.sinh_coefficients`, or () for a sinh."""
    u = x / span
    driven = u.detach().clamp(floor, 1.0)
    driven = (driven * levels).round() / levels if levels else driven
    # Clamped inputs get no gradient, but zeros do although they may be the floor.
    inside = (driven < 1.0) & (driven > floor if floor else driven >= 0.0)
    u = torch.where(inside, u + (driven - u.detach()), driven)
    if b < LINEAR_B:
        return u * gain
    t = b * u
    return t * horner(tuple(gain * c for c in coefficients), t * t) if coefficients else torch.sinh(t) * gain


def quantize(y: Tensor, step: Tensor, levels: int, bias: Tensor | None = None) -> Tensor:
    """As :class:`.functional.Quantize`."""
    result = y + ((y / step.clamp(min=1e-30)).round().clamp(-levels, levels) * step - y).detach()
    return result if bias is None else result + bias


def weight_variance(weight: Tensor, scale: Tensor, error: WeightError) -> Tensor:
    """As :class:`.cells.WeightVariance`."""
    return scale.square() * _square(error, _magnitude(weight, scale))


def drifted_weight(weight: Tensor, scale: Tensor, noise: Tensor, error: WeightError) -> tuple[Tensor, Tensor]:
    """As :class:`.cells.DriftedWeight`, with the variance."""
    a = _magnitude(weight, scale)
    square = _square(error, a)
    mean = error.means[0]
    held = a + horner(mean, a) if any(mean) else a
    drifted = scale * (held * weight.sign() + square.clamp(min=1e-30).sqrt() * noise)
    return drifted, scale.square() * square


def row_power(s: Tensor, keep: Tensor | None) -> Tensor:
    """As :class:`.power.InputPower`."""
    square = s.to(torch.promote_types(s.dtype, torch.float32)).square()
    return (square if keep is None else square * _rows_like(keep, s)).sum(0)


def total_power(y: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """As :class:`.power.OutputPower`."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    signal = y if bias is None else y - bias
    return (signal if keep is None else signal * _rows_like(keep, y)).square().sum()


@torch.library.custom_op("hf_reram::seeded_normal", mutates_args=())
def seeded_normal(like: Tensor, seed: Tensor, name: str) -> Tensor:
    """:func:`.noise.white_noise_like` for a layer's name and a seed, (), int64 on the CPU; a negative seed draws
    from PyTorch's global generator. An operator, so that the compiler need not look into generators, nor compile anew
    for each seed."""
    from ..state import layer_seed

    number = int(seed)
    generator = None if number < 0 else torch.Generator(like.device).manual_seed(layer_seed(number, name))
    return white_noise_like(like, generator)


@seeded_normal.register_fake
def _(like: Tensor, seed: Tensor, name: str) -> Tensor:
    return torch.empty_like(like)


def held_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """As :func:`.cells.map_weight`: a weight at its very edge keeps its gradient."""
    inside = weight.detach().abs() <= scale * (1.0 + 4 * torch.finfo(weight.dtype).eps)
    return torch.where(inside, weight, torch.clamp(weight.detach(), -scale, scale))


def _magnitude(weight: Tensor, scale: Tensor) -> Tensor:
    return (held_weight(weight, scale) / scale.clamp(min=1e-30)).abs()


def _square(error: WeightError, a: Tensor) -> Tensor:
    if error.std is None:
        return horner(error.variance, a)
    return horner(error.std, a).square() + error.floor


def _rows_like(keep: Tensor, like: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (like.dim() - 1))
