"""Batch norm of models that go on crossbars: folded into the convolutions, re-estimated, or frozen."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.inputs import call_model, evaluating

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """The model's batch norm layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}


def freeze_batch_norm(model: nn.Module) -> None:
    """Have batch norm use its running statistics until the next ``model.train()``."""
    for norm in batch_norms(model).values():
        norm.eval()


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics by those of ``batches``, averaged over them, everything else in evaluation mode.

    On a patched model they are those of the crossbar. Each batch counts the same.

    Args:
        batches: of model inputs, mappings or tensors; a few hundred examples are enough.

    Raises:
        ValueError: there are no batches.
    """
    norms = [norm for norm in batch_norms(model).values() if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # PyTorch then averages over all batches
                norm.train()
            for batch in batches:
                call_model(model, batch)
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    if not seen:
        raise ValueError("batches is empty: allowed is at least one batch of model inputs")


@torch.no_grad()
def fold_batch_norm(model: nn.Module, batch: Any) -> list[str]:
    """Move the scale of every batch norm that follows a convolution or linear layer into its weights, in place.

    ``γ (W x − μ) / √(σ² + ε) + β`` becomes ``W' x − μ' + β`` with ``W' = W γ / √(σ² + ε)``: a deployed chip has no
    batch norm, only the bias that its columns have anyway. The layers stay where they are, with running variance and
    γ such that they scale by 1, so that the checkpoint keeps its keys and loads with ``from_pretrained``. The model
    computes the same in evaluation mode; train it with batch norm frozen.

    Args:
        batch: model inputs, for one forward that shows which layer feeds which batch norm.

    Returns:
        Names of the batch norms that were folded.
    """
    folded = []
    names = {norm: name for name, norm in batch_norms(model).items()}
    for norm, layer in _pairs(model, batch).items():
        if norm.running_var is None or norm.running_mean is None:
            continue
        gamma = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
        scale = gamma / torch.sqrt(norm.running_var + norm.eps)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)
        norm.running_mean.mul_(scale)
        # √(σ² + ε) is 1 in floating point too, and so is γ.
        norm.running_var.fill_(1.0 - norm.eps)
        if norm.weight is not None:
            norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
        folded.append(names[norm])
    return folded


def _pairs(model: nn.Module, batch: Any) -> dict[Any, Any]:
    """Which layer each batch norm gets its input from, where that layer feeds nothing else and both run once."""
    origin: dict[int, Any] = {}
    kept: list[Tensor] = []  # so that no tensor's id is used again
    pairs: dict[Any, Any] = {}
    runs: dict[nn.Module, int] = {}

    def after(module, args, output):
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, LINEAR) and isinstance(output, Tensor):
            origin[id(output)] = module
            kept.append(output)

    def before(module, args):
        if (source := origin.get(id(args[0]))) is not None:
            pairs[module] = source

    with evaluating(model):
        handles = [m.register_forward_hook(after) for m in model.modules() if isinstance(m, (*LINEAR, *NORMS))]
        handles += [norm.register_forward_pre_hook(before) for norm in batch_norms(model).values()]
        try:
            call_model(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    sources = list(pairs.values())
    return {n: s for n, s in pairs.items() if runs[n] == runs[s] == 1 and sources.count(s) == 1}
