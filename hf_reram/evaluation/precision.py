"""A model as it was before an evaluation that casts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..nn import CrossbarLayer


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Parameters, gradients, buffers and chips inside may be cast and moved; afterwards they are what they were, bit
    for bit. Nothing is copied: what a cast replaces is held on to meanwhile."""
    before: list[tuple[Any, dict, dict, Any]] = []
    for module in model.modules():
        chips = (module._chips, module.chip) if isinstance(module, CrossbarLayer) else None
        before.append((module, dict(module._parameters), dict(module._buffers), chips))
    tensors = {p for _, parameters, _, _ in before for p in parameters.values() if p is not None}
    data = [(p, p.data, p.grad, None if p.grad is None else p.grad.data) for p in tensors]
    try:
        yield
    finally:
        for p, value, grad, grad_value in data:
            p.data, p.grad = value, None  # of the dtype of p
            if grad is not None:
                grad.data = grad_value
                p.grad = grad
        for module, parameters, buffers, chips in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if chips is not None:
                module._chips, module.chip = chips
