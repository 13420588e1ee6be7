"""Random probes of a model's predictions (:func:`fisher_probe`), and their backward passes: what gradients of them tell
of each crossbar layer is what the model's predictions depend on.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.deploy import digital_eval
from ..model.find import crossbar_layers
from ..model.inputs import call_model, find_predictions, forked_rng, uncompiled
from ..model.sharding import is_sharded, reshard
from ..nn import CrossbarLayer
from ..nn.places import parameter_of
from ..nn.tensors import tensors_of


def probe(
    model: nn.Module,
    batches: Iterable,
    watch: Callable[[CrossbarLayer, Tensor], Callable[[Tensor], None]],
    enough: Callable[[Any], bool] = lambda outputs: False,
) -> list[str]:
    """Run a backward pass of a probe of the digital model's predictions for each batch; names of the layers that were
    called without gradients alone.

    Args:
        watch: called with each crossbar layer and its input, gives what is called with the gradient of its output.
        enough: called with the outputs, whether no more batches are needed.
    """
    layers = crossbar_layers(model)
    gathered: list[Tensor] = []  # that FSDP2 has in place of parameters in a forward, and does not train if frozen

    reached: dict[str, bool] = {}

    def observe(layer: CrossbarLayer, args, kwargs, y):
        reached[layer.crossbar_name] = reached.get(layer.crossbar_name, False) or y.requires_grad
        if not y.requires_grad:
            return
        with torch.autocast(y.device.type, enabled=False):
            y.register_hook(watch(layer, tensors_of((args, kwargs))[0]))

    def reach(layer: CrossbarLayer, args):
        if (weight := parameter_of(layer)) not in parameters:
            gathered.append(weight.requires_grad_(True))

    parameters = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    hooks = []
    try:
        hooks += [layer.register_forward_hook(observe, with_kwargs=True) for layer in layers.values()]
        if is_sharded(model):
            reshard(model)
            hooks += [layer.register_forward_pre_hook(reach) for layer in layers.values()]
        for p in parameters:  # so that the backward pass reaches every layer even where all of them are frozen
            p.requires_grad_(True)
        with uncompiled(), digital_eval(model), torch.enable_grad(), forked_rng(model):
            torch.manual_seed(0)
            for batch in batches:
                outputs = call_model(model, batch)
                # Not of the outputs, which the model may have changed in place since the hooks were put on them.
                torch.autograd.grad(fisher_probe(outputs, model).sum(), [*parameters, *gathered], allow_unused=True)
                gathered.clear()
                if enough(outputs):
                    break
    finally:
        for hook in hooks:
            hook.remove()
        for p, required in parameters.items():
            if p.requires_grad is not required:
                p.requires_grad_(required)
        reshard(model)
    return [name for name, was in reached.items() if not was]


def examples_of(batch: Any) -> int:
    """How many examples a batch has, by its first tensor."""
    tensors = [t for t in tensors_of(batch) if t.dim()]
    return len(tensors[0]) if tensors else 1


def fisher_probe(outputs, model: nn.Module | None = None) -> Tensor:
    """A number of each example whose gradients' second moments are the Fisher information: ``Σ z · logits`` with
    ``z = √p ε - p Σ √p ε``, ε standard normal, whose covariance ``diag(p) - p pᵀ`` is that of the log-likelihood's
    gradient for labels drawn from the model. Drawn labels would say next to nothing of a confident classifier, whose
    information is all in the labels that it hardly ever draws. Labels that are predicted each for itself have
    ``z = √(p(1-p)) ε``, values, as means of unit Gaussians, ``z = ε``, and padding has 0.

    Args:
        model: that gave the outputs last, see :func:`.find_predictions`.

    Returns:
        (batch,).
    """
    parts = []
    for prediction in find_predictions(outputs, model):
        logits = prediction.by_place(prediction.logits)
        z = torch.randn_like(logits)
        if prediction.kind == "labels":
            p = logits.detach().sigmoid()
            z = (p * (-logits.detach()).sigmoid()).sqrt() * z
        elif prediction.kind == "classes":
            p = logits.detach().softmax(-1)
            z = p.sqrt() * z
            z = z - p * z.sum(-1, keepdim=True)
        if prediction.keep is not None:
            z = z * prediction.keep[..., None]
        parts.append((z * logits).sum((1, 2)))
    return torch.stack(parts).sum(0)
