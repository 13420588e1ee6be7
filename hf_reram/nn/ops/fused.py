"""The element-wise work of crossbars in one kernel, compiled by ``torch.compile``, while the model stays in eager mode.

Off until :func:`use_fused_kernels`: compiling takes seconds, and needs a C++ compiler on a CPU. Each kernel gets its
numbers in a tensor, so that layers with different ranges share it.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .chunks import alike, flat

# As many as POLYNOMIAL_B needs. Zeros behind a shorter polynomial cost nothing beside the memory traffic, and all
# layers share one kernel.
COEFFICIENTS = 7

_enabled = False


def use_fused_kernels(enabled: bool = True) -> None:
    """Compute the I-V curve, its gradient and the ADC of all crossbars of this process in fused kernels, where PyTorch
    would make a pass over the activations for each operation. A whole model under ``torch.compile`` does not need it.

    The kernels are compiled here, in some seconds the first time; PyTorch keeps them on disk. Results agree with those
    of eager mode to rounding.

    Args:
        enabled: False goes back to eager mode.

    Raises:
        RuntimeError: they cannot be compiled here, as without a C++ compiler.
    """
    global _enabled
    if enabled:
        try:
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                _try_out(device)
        except Exception as error:  # whatever the compiler raises
            raise RuntimeError(f"fused kernels cannot be compiled here: {error}") from error
    _enabled = enabled


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels are on and take these: equally laid out, float32, or half precision on a GPU."""
    if not _enabled or not alike(*tensors):
        return False
    allowed = (torch.float32, torch.bfloat16, torch.float16) if tensors[0].is_cuda else (torch.float32,)
    return all(t.dtype in allowed and t.device.type in ("cpu", "cuda") for t in tensors)


def sinh(
    x: Tensor, offset: Tensor | None, steps: float, low: float, high: float, levels: int, coefficients: tuple
) -> Tensor:
    """``p(clamp(steps (x - offset), low, high))``, rounded first if there are levels, for the odd polynomial p."""
    filled = coefficients + (0.0,) * (COEFFICIENTS - len(coefficients))
    numbers = _numbers((steps, low, high, float(levels > 0), *filled), x.device)
    if offset is None:
        return _compiled(_sinh)(flat(x.detach()), numbers).as_strided(x.shape, x.stride())
    return _compiled(_centered_sinh)(x.detach().view(-1, len(offset)), offset, numbers).view(x.shape)


def sinh_backward_(grad: Tensor, s: Tensor, limits: tuple[float, float], scale: float, gain: float) -> Tensor:
    """``grad · scale · sqrt(gain² + s²)`` where ``s`` lies between the limits, else 0, into ``grad``."""
    _compiled(_slope)(flat(grad), flat(s), _numbers((*limits, scale, gain), s.device))
    return grad


def pulled_backward_(
    grad: Tensor,
    s: Tensor,
    limits: tuple[float, float],
    scale: float,
    gain: float,
    amount: Tensor,
    keep: Tensor | None,
) -> Tensor:
    """The same with ``grad + amount · keep · s`` for ``grad``; all contiguous."""
    numbers, amount = _numbers((*limits, scale, gain), s.device), amount.reshape(-1)
    rows = (t.view(-1, len(amount)) for t in (grad, s))
    if keep is None:
        _compiled(_pulled)(*rows, amount, numbers)
    else:
        _compiled(_kept_pulled)(*rows, amount, keep.view(-1, 1), numbers)
    return grad


def quantize_(y: Tensor, step: Tensor, levels: int, bias: Tensor | None) -> Tensor:
    """As :class:`.functional.Quantize`, in place; ``step`` and ``bias`` broadcast to y."""
    rows = y.view(-1, y.shape[-1]) if step.dim() == 1 and y.is_contiguous() else y
    numbers = _numbers((float(levels),), y.device)
    if bias is None:
        _compiled(_quantize)(rows, step, numbers)
    else:
        _compiled(_biased_quantize)(rows, step, bias.detach(), numbers)
    return y


# The kernels. Each variant is a function of its own: how often PyTorch compiles one anew is limited.


def _sinh(x: Tensor, numbers: Tensor) -> Tensor:
    return _driven(x.float() * numbers[0], numbers).to(x.dtype)


def _centered_sinh(x: Tensor, offset: Tensor, numbers: Tensor) -> Tensor:
    return _driven((x.float() - offset) * numbers[0], numbers).to(x.dtype)


def _driven(t: Tensor, numbers: Tensor) -> Tensor:
    t = torch.clamp(t, numbers[1], numbers[2])
    t = torch.where(numbers[3] > 0, t.round(), t)
    square, value = t * t, numbers[3 + COEFFICIENTS]
    for k in range(COEFFICIENTS - 1, 0, -1):
        value = value * square + numbers[3 + k]
    return t * value


def _slope(grad: Tensor, s: Tensor, numbers: Tensor) -> None:
    grad.copy_(_through(grad.float(), s.float(), numbers))


def _pulled(grad: Tensor, s: Tensor, amount: Tensor, numbers: Tensor) -> None:
    grad.copy_(_through(grad.float() + s.float() * amount, s.float(), numbers))


def _kept_pulled(grad: Tensor, s: Tensor, amount: Tensor, keep: Tensor, numbers: Tensor) -> None:
    grad.copy_(_through(grad.float() + s.float() * amount * keep, s.float(), numbers))


def _through(grad: Tensor, s: Tensor, numbers: Tensor) -> Tensor:
    low, high, scale, gain = (numbers[i] for i in range(4))
    ratio = s / gain
    slope = (ratio * ratio + 1.0).sqrt() * (scale * gain)
    return torch.where((s <= low) | (s >= high), 0.0, grad * slope)


def _quantize(y: Tensor, step: Tensor, numbers: Tensor) -> None:
    y.copy_(_code(y, step, numbers) * step)


def _biased_quantize(y: Tensor, step: Tensor, bias: Tensor, numbers: Tensor) -> None:
    y.copy_(bias + _code(y, step, numbers) * step)


def _code(y: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
    return torch.clamp((y / step.clamp(min=1e-30)).round(), -numbers[0], numbers[0])


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


@lru_cache(maxsize=4096)
def _numbers(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may follow
        return torch.tensor(numbers, dtype=torch.float32, device=device)


@torch.no_grad()
def _try_out(device: str) -> None:
    """Compile what training on float32 needs."""
    x, offset = torch.linspace(-2, 2, 48 * 40, device=device).view(48, 40), torch.zeros(40, device=device)
    sinh(x, None, 1.0, -1.0, 1.0, 0, (1.0, 0.1))
    s = sinh(x, offset, 1.0, -1.0, 1.0, 0, (1.0, 0.1))
    sinh_backward_(x, s, (-1.0, 1.0), 1.0, 1.0)
    for bias in (None, offset):
        quantize_(s, offset + 1, 7, bias)
