"""Where a loss that is not finite comes from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.tensors import tensors_of
from .losses import noise_to_signal


def explain(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first layer, in the order of the forward, that makes NaN or infinite values out of finite ones.

    Args:
        model: patched. forward: calls it as the loss did.
    """
    for name, tensor in model.state_dict().items():
        if not _finite(tensor):
            return f"{name!r} of the model holds NaN or infinite values"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_Look(name, found), with_kwargs=True)
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    bad = [name for name, ratio in noise_to_signal(model).items() if not torch.isfinite(torch.tensor(ratio))]
    if bad:
        return f"the retention loss of layer {bad[0]!r} is not finite"
    return "all layers give finite values: it is the loss function that does not, on these labels"


class _Look:
    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.found or all(map(_finite, tensors_of(output))):
            return
        given = tensors_of((args, kwargs))
        name = f"layer {self.name!r} ({type(module).__name__})"
        if not all(map(_finite, given)):
            self.found.append(f"{name} is given NaN or infinite values")
        else:
            largest = max((float(t.detach().abs().max()) for t in given if t.numel()), default=0.0)
            self.found.append(f"{name} makes NaN or infinite values of inputs of at most {largest:.3g}")


def _finite(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
