"""Models are called and answer in many shapes; what they predict is in their logits."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def call_model(model: nn.Module, batch):
    """Call the model with a batch, moved to its device, without arguments that its forward does not take."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        known = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key in parameters or (open_ended and isinstance(value, Tensor))
        }
        return model(**known)
    if isinstance(batch, (tuple, list)):
        return model(*(value.to(device) if isinstance(value, Tensor) else value for value in batch))
    return model(batch.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode for as long as the context lasts; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_logits(outputs) -> list[Tensor]:
    """The logits in a model's outputs: every tensor under a key that ends in "logits", or, where there is none, the
    last hidden state, or the output itself if it is a tensor.

    Raises:
        ValueError: there is none of these.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        found = [v for k, v in outputs.items() if k.endswith("logits") and isinstance(v, Tensor)]
        if not found and isinstance(outputs.get("last_hidden_state"), Tensor):
            found = [outputs["last_hidden_state"]]
        if found:
            return found
        raise ValueError(f"the model's outputs {sorted(outputs)} hold no logits and no last_hidden_state")
    if isinstance(outputs, (tuple, list)):
        return [v for v in outputs if isinstance(v, Tensor) and v.dim() > 1][:1] or _no_tensor(outputs)
    return _no_tensor(outputs)


def _no_tensor(outputs):
    raise ValueError(f"the model's output of type {type(outputs).__name__} holds no logits")


def divergence(student, teacher, temperature: float = 1.0) -> Tensor:
    """How far the student's predictions are from the teacher's: KL(teacher ‖ student) over the last dimension of each
    logits tensor, mean over all others, summed over tensors; for a single regression value, the mean squared error.

    Args:
        student, teacher: outputs of two forwards of models with the same head; the teacher's get no gradient.
        temperature: divides the logits, and its square multiplies the divergence, so that gradients stay of one size
            (Hinton et al., arXiv 1503.02531). Above 1, classes that are unlikely count more.

    Raises:
        ValueError: their logits differ in shape.
    """
    total: Tensor | None = None
    for s, t in zip(find_logits(student), find_logits(teacher), strict=True):
        if s.shape != t.shape:
            raise ValueError(f"student logits {tuple(s.shape)} and teacher logits {tuple(t.shape)} differ in shape")
        s, t = s.float(), t.detach().float()
        if s.shape[-1] == 1:
            part = F.mse_loss(s, t)
        else:
            log_s, log_t = ((z.reshape(-1, z.shape[-1]) / temperature).log_softmax(-1) for z in (s, t))
            part = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
        total = part if total is None else total + part
    assert total is not None
    return total


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
