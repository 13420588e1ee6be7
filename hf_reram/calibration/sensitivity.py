"""How much the model's predictions depend on each output channel of each crossbar layer."""

import torch
from torch import Tensor, nn

from ..model.deploy import digital_eval
from ..model.find import crossbar_layers
from ..model.inputs import call_model, find_logits, uncompiled
from ..nn import CrossbarLayer
from ..nn.tensors import tensors_of


def measure_sensitivity(model: nn.Module, batches: list) -> None:
    """Set ``layer.sensitivity``, (output channels,): the Fisher information ``h_i = E δ_i²`` of output channel i, where
    δ is the gradient, at one token or pixel, of an example's log-likelihood of labels drawn from the model itself.

    To second order an error Δy in a layer's output changes the prediction by ``KL ≈ ½ Σ_i h_i Δy_i²`` nats, so the
    layers' expected errors weighted by h add up to the KL divergence that ageing causes (diagonal approximation).
    """
    layers = crossbar_layers(model)
    sums: dict[CrossbarLayer, list] = {layer: [0.0, 0] for layer in layers.values()}

    def watch(layer: CrossbarLayer, args, kwargs, y):
        if not y.requires_grad:
            return
        keep = layer.crossbar.forward.padding.keep(tensors_of((args, kwargs))[0]) if layer.channel_dim == -1 else None

        def collect(grad):
            examples = layer.examples(grad.float())
            flat = examples.flatten(2) if layer.reads_windows else examples
            square = flat.square().flatten(2).sum(2) if flat.dim() == 3 else flat.square()
            rows = len(square) if keep is None else float(keep.sum())
            total = square.sum(0) if keep is None else keep.to(square) @ square
            sums[layer][0] = sums[layer][0] + total.detach()
            sums[layer][1] += rows * (flat.shape[2] if flat.dim() == 3 else 1)

        y.register_hook(collect)

    hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers.values()]
    # Every parameter, so that the backward pass reaches every layer even where all of them are frozen.
    parameters = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    for p in parameters:
        p.requires_grad_(True)
    try:
        with uncompiled(), digital_eval(model), torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for batch in batches:
                likelihood = sampled_log_likelihood(call_model(model, batch))
                torch.autograd.grad(likelihood.sum(), list(parameters), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        for p, required in parameters.items():
            p.requires_grad_(required)
    for layer, (total, count) in sums.items():
        layer.sensitivity = torch.zeros(layer.outputs) if count == 0 else (total / count)


def sampled_log_likelihood(outputs) -> Tensor:
    """Log-probability of predictions drawn from the model itself, one value per example: its gradients' second
    moments are the Fisher information. A single regression value counts as the mean of a unit Gaussian.

    Returns:
        (batch,).
    """
    parts = []
    for logits in find_logits(outputs):
        flat = logits.float().reshape(logits.shape[0], -1, logits.shape[-1])
        if flat.shape[-1] == 1:
            drawn = flat.detach() + torch.randn_like(flat)
            parts.append(-0.5 * (drawn - flat).square().sum((1, 2)))
            continue
        log_p = flat.log_softmax(-1)
        labels = torch.distributions.Categorical(logits=log_p.detach()).sample()
        parts.append(log_p.gather(-1, labels[..., None]).sum((1, 2)))
    return torch.stack(parts).sum(0)
