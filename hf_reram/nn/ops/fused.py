"""The element-wise work of crossbars in one kernel each, while the model stays in eager mode: the definitions of
:mod:`.reference`, compiled by ``torch.compile``.

Off until :func:`use_fused_kernels`: compiling takes seconds, and needs a C++ compiler on a CPU. Numbers go in as
tensors, so that layers with different ranges share a kernel.
"""

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cpu import alike, flat

# As many as POLYNOMIAL_B needs: zeros behind a shorter polynomial cost nothing beside the memory traffic.
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


def twin(*tensors: Tensor) -> Any:
    """This module where the kernels are on and take these: equally laid out, float32, or half precision on a GPU; else
    None."""
    if not _enabled or not alike(*tensors):
        return None
    allowed = (torch.float32, torch.bfloat16, torch.float16) if tensors[0].is_cuda else (torch.float32,)
    good = all(t.dtype in allowed and t.device.type in ("cpu", "cuda") for t in tensors)
    return _this() if good else None


def shrunk_sinh(
    x: Tensor, offset: Tensor | None, span: float, b: float, gain: float, levels: int, floor: float
) -> Tensor:
    """:func:`.reference.shrunk_sinh` for a range that is a float."""
    bound = levels or 1
    curved = reference.LINEAR_B <= b <= reference.POLYNOMIAL_B
    coefficients = reference.folded(b, b / bound, gain) if curved else None
    if coefficients is None or (offset is not None and not x.is_contiguous()):
        return reference.shrunk_sinh(x, offset, span, b, gain, levels, floor)
    filled = coefficients + (0.0,) * (COEFFICIENTS - len(coefficients))
    numbers = _numbers((bound / span, floor * bound, float(bound), *filled), x.device)
    kernel = _compiled(_rounded_sinh if levels else _sinh)
    if offset is None:
        return kernel(flat(x), None, numbers).as_strided(x.shape, x.stride())
    return kernel(x.view(-1, len(offset)), offset, numbers).view(x.shape)


def shrunk_sinh_gradient_(grad: Tensor, s: Tensor, low: float, high: float, scale: float, gain: float) -> Tensor:
    """:func:`.reference.shrunk_sinh_gradient` into ``grad``."""
    _compiled(_slope)(flat(grad), flat(s), _numbers((low, high, scale, gain), s.device))
    return grad


def quantize_(y: Tensor, step: Tensor, levels: int, bias: Tensor | None) -> Tensor:
    """:func:`.reference.quantize` into y."""
    rows = y.view(-1, y.shape[-1]) if step.dim() == 1 and y.is_contiguous() else y
    _compiled(_quantize)(rows, step, None if bias is None else bias.detach(), _numbers((float(levels),), y.device))
    return y


# The kernels


def _sinh(x: Tensor, offset: Tensor | None, n: Tensor) -> Tensor:
    return reference.polynomial_sinh(x.float(), offset, n[0], n[1], n[2], False, n[3:].unbind()).to(x.dtype)


def _rounded_sinh(x: Tensor, offset: Tensor | None, n: Tensor) -> Tensor:
    return reference.polynomial_sinh(x.float(), offset, n[0], n[1], n[2], True, n[3:].unbind()).to(x.dtype)


def _slope(grad: Tensor, s: Tensor, n: Tensor) -> None:
    grad.copy_(reference.shrunk_sinh_gradient(grad.float(), s.float(), *n.unbind()))


def _quantize(y: Tensor, step: Tensor, bias: Tensor | None, n: Tensor) -> None:
    y.copy_(reference.quantize(y, step, n[0], bias))


def _this() -> ModuleType:
    return sys.modules[__name__]


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
    shrunk_sinh(x, None, 1.0, 0.5, 1.0, 0, -1.0)
    s = shrunk_sinh(x, offset, 1.0, 0.5, 1.0, 0, -1.0)
    shrunk_sinh_gradient_(x, s, -1.0, 1.0, 1.0, 1.0)
    for bias in (None, offset):
        quantize_(s, offset + 1, 7, bias)
