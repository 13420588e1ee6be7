"""The retention loss: what the layers' last forward collected, and how it joins the task loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.find import crossbar_layers, crossbar_state
from ..nn.attach import Add
from ..nn.layer import CrossbarMixin
from ..nn.state import CrossbarState


def _collected(model: nn.Module) -> tuple[CrossbarState, Tensor]:
    """The terms of the last training forward, (layers, 2)."""
    state = crossbar_state(model)
    if state.term is None:
        raise ValueError(
            f"retention_loss={state.config.retention_loss!r} has no closed form to collect: "
            "use one with 'output', 'weight' or 'sensitivity'"
        )
    if not state.terms:
        raise RuntimeError("no retention terms: call the model in training mode (model.train()) first")
    state.consumed = True
    return state, torch.stack([term.to(next(iter(state.terms.values())).device) for term in state.terms.values()])


def _reduce(state: CrossbarState, terms: Tensor) -> Tensor:
    """Noise-to-signal ratios are averaged over layers; expected KL divergences add up."""
    ratios = terms[:, 0] / terms[:, 1].clamp(min=1e-30)
    return ratios.sum() if state.term == "sensitivity" else ratios.mean()


def retention_loss(model: nn.Module) -> Tensor:
    """The retention loss of the model's last forward in training mode, a scalar that can be differentiated.

    Add it to a task loss in a training loop of your own; under DDP, FSDP2 or reentrant gradient checkpointing use
    :func:`add_retention_loss` instead. :class:`hf_reram.ReRAMTrainer` does that itself.

    Raises:
        ValueError: the model is not patched, or its config has no closed-form retention loss.
        RuntimeError: no forward in training mode has run.
    """
    return _reduce(*_collected(model))


def add_retention_loss(task_loss: Tensor, model: nn.Module, weight: float | None = None) -> tuple[Tensor, Tensor]:
    """``task_loss + weight · retention loss``, the terms' gradients travelling attached to their layers' outputs
    (:mod:`hf_reram.nn.attach`): right under DDP, FSDP2, both gradient checkpointings, accumulation and loss scaling.
    Over several processes, expectations run over the batches of all of them. ``task_loss`` must depend on the model's
    last forward in training mode.

    Args:
        task_loss: scalar. weight: None takes ``config.retention_weight``.

    Returns:
        The sum, and the retention loss alone, detached. Where the config's loss has no closed form ("drift", "noise",
        "none") that is ``task_loss`` itself and 0.

    Raises:
        ValueError: the model is not patched, or its loss is "consistency", which takes a second forward.
        RuntimeError: no forward in training mode has run.
    """
    state = crossbar_state(model)
    if state.term is None and state.config.retention_loss != "consistency":
        return task_loss, torch.zeros_like(task_loss.detach())
    state, terms = _collected(model)
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    own, terms = terms, terms.detach().clone()
    if processes > 1:
        dist.all_reduce(terms)
    terms.requires_grad_(True)
    with torch.enable_grad():
        value = _reduce(state, terms)
    (gradients,) = torch.autograd.grad(value, terms)
    layers = crossbar_layers(model)
    scales = [layers[name].term_scale for name in state.terms]
    if state.term == "output":
        state.ratios = {name: term.detach() for name, term in state.terms.items()}
    state.terms = {}  # their graphs would keep activations alive
    weight = state.config.retention_weight if weight is None else weight
    gradients = gradients * processes  # which are averaged over processes later
    if not state.attached:
        pull = (own * gradients).sum()
        return task_loss + weight * (value.detach() + pull - pull.detach()).to(task_loss), value.detach()
    return Add.apply(task_loss, value.detach(), weight, scales, gradients), value.detach()


def noise_to_signal(model: nn.Module) -> dict[str, float]:
    """Each layer's noise-to-signal ratio in the last forward in training mode that measured it, by layer name; empty
    if none did."""
    state = crossbar_state(model)
    pairs = state.ratios or (state.terms if state.term == "output" else {})
    if not pairs:
        return {}
    values = torch.stack([pair.detach().float().cpu() for pair in pairs.values()])
    return dict(zip(pairs, (values[:, 0] / values[:, 1].clamp(min=1e-30)).tolist()))


@contextmanager
def sampled_drift(model: nn.Module, kind: str | None = None) -> Iterator[None]:
    """Training forwards inside sample the retention error anew: ``W + m(W) + s(W) ε``, differentiable through both.

    Args:
        kind: "drift" (the device's), "noise" (white, of the same power); None takes what ``config.retention_loss``
            says, and nothing is sampled where it says neither. The backward may come after the context.
    """
    state = crossbar_state(model)
    before = state.wanted
    state.wanted = kind or state.configured_drift
    state.take_wanted()
    state.draw_drift_time()
    if state.drift == "noise":
        for layer in crossbar_layers(model).values():
            if not hasattr(layer.weight, "device_mesh"):  # FSDP2 has the weights together in the forward alone
                layer.white_noise_std()  # known before compiled code needs it
    try:
        yield
    finally:
        # From the next forward on: with gradient checkpointing, this one's backward runs parts of it again.
        state.wanted = before


@torch.no_grad()
def hold_weights(model: nn.Module) -> None:
    """Move every weight that lies outside its cells' range back to its edge, in place; also those that FSDP2 has
    sharded, and what DeepSpeed's ZeRO 1 and 2 keep of them in float32.

    Raises:
        NotImplementedError: ZeRO 3 has taken the weights apart.
    """
    for layer in crossbar_layers(model).values():
        if layer.weight.requires_grad:
            _clamp_to_scale(layer)


def _clamp_to_scale(layer: CrossbarMixin) -> None:
    weight: Any = layer.weight
    if hasattr(weight, "ds_id"):
        raise NotImplementedError("DeepSpeed's zero_stage=3 is not supported: allowed are 0, 1 and 2; or use FSDP2")
    scale = layer.held_scale()
    if layer.equalized:
        scale = scale / layer._along_inputs(layer.input_scale).to(scale.dtype)
    if hasattr(weight, "device_mesh"):  # FSDP2: shard the scale as the weight is, then clamp each rank's own part
        from torch.distributed.tensor import distribute_tensor

        full = scale.expand(weight.shape).contiguous()
        scale = distribute_tensor(full, weight.device_mesh, weight.placements).to_local()
        weight = weight.to_local()
    _clamp(weight, scale)
    if (master := getattr(weight, "_hp_mapping", None)) is not None:
        # DeepSpeed's ZeRO 1 and 2: the next step goes on from this rank's part of the weight in float32.
        start, size = master.lp_fragment_address.start, master.lp_fragment_address.numel
        part = master.get_hp_fragment()
        _clamp(part, scale.expand(weight.shape).reshape(-1)[start : start + size].to(part))


def _clamp(weight: Tensor, scale: Tensor) -> None:
    torch.minimum(weight, scale, out=weight)
    torch.maximum(weight, -scale, out=weight)
