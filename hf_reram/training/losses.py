"""The retention loss: what the layers' forwards collected, and how it joins the task loss."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..device.checks import is_finite
from ..device.seeds import checked_seed
from ..model.find import arrays, crossbar_layers, crossbar_state, crossbar_states, patched_layers
from ..model.hooks import MASTERS
from ..model.inputs import uncompiled
from ..model.sharding import processes
from ..nn import CrossbarLayer
from ..nn.attach import Add
from ..nn.clipping import warn_clipped
from ..nn.forward import Forward, add_term
from ..nn.physics import sampling
from ..nn.places import Part, is_trained, parameter_of
from ..nn.state import CrossbarState
from ..nn.tensors import is_shard
from .learned import hold_range, is_learned

NO_TERMS = "no retention terms: call the model in training mode (model.train()) first"


def _collected(state: CrossbarState, needed: bool = True) -> tuple[list[Forward], dict[str, Tensor]]:
    """The forwards that no loss has taken yet, and their terms by layer, (2,) each, summed over them."""
    forwards = state.waiting()
    terms: dict[str, Tensor] = {}
    for forward in forwards:
        for name, term in forward.terms.items():
            add_term(terms, name, term)
    if needed and not terms:
        raise RuntimeError(NO_TERMS)
    return forwards, terms


def _with_terms(model: nn.Module) -> list[CrossbarState]:
    states = [state for state in crossbar_states(model) if state.term is not None]
    if not states:
        raise ValueError(
            f"retention_loss={crossbar_state(model).config.retention_loss!r} has no closed form to collect: "
            "use one with 'output', 'weight' or 'sensitivity'"
        )
    return states


def _stacked(terms: dict[str, Tensor]) -> Tensor:
    """(layers, 2)."""
    device = next(iter(terms.values())).device
    return torch.stack([term.to(device) for term in terms.values()])


def _reduce(state: CrossbarState, terms: Tensor) -> Tensor:
    """Noise-to-signal ratios are averaged over layers; expected KL divergences add up."""
    ratios = terms[:, 0] / terms[:, 1].clamp(min=1e-30)
    return ratios.sum() if state.term == "sensitivity" else ratios.mean()


def retention_loss(model: nn.Module) -> Tensor:
    """The retention loss of the model's forwards in training mode that no loss has taken yet, a scalar that can be
    differentiated; of parts that were patched by themselves, the sum.

    Add it to a task loss in a training loop of your own; under DDP, FSDP2 or reentrant gradient checkpointing use
    :func:`add_retention_loss` instead. :class:`hf_reram.ReRAMTrainer` does that itself.

    Raises:
        ValueError: the model is not patched, or its config has no closed-form retention loss.
        RuntimeError: no forward in training mode has run.
    """
    total: Any = 0.0
    for state in _with_terms(model):
        forwards, terms = _collected(state)
        if state.term == "output":
            state.ratios = {name: term.detach() for name, term in terms.items()}
        total = total + _reduce(state, _stacked(terms))
        state.settle(forwards)
    return total


def add_retention_loss(task_loss: Tensor, model: nn.Module, weight: float | None = None) -> tuple[Tensor, Tensor]:
    """``task_loss + weight · retention loss``, the terms' gradients travelling attached to their layers' outputs
    (:mod:`hf_reram.nn.attach`): right under DDP, FSDP2, both gradient checkpointings, accumulation and loss scaling.
    Expectations run over all forwards in training mode that no loss has taken yet and whose outputs are still there, as
    two towers or two views of a contrastive loss have them, and over the batches of all processes. ``task_loss`` must
    depend on these forwards.

    Args:
        task_loss: scalar. weight: None takes ``config.retention_weight``.

    Returns:
        The sum, and the retention loss alone, detached. Where the config's loss has no closed form ("drift", "noise",
        "none") that is ``task_loss`` itself and 0.

    Raises:
        ValueError: the model is not patched, its loss is "consistency", which takes a second forward, or a bad weight.
        RuntimeError: no forward in training mode has run, or only without gradients although ``task_loss`` has some.
    """
    if weight is not None and not (is_finite(weight) and weight >= 0):
        raise ValueError(f"weight={weight!r}: allowed is a finite number of at least 0, or None")
    return join_terms(task_loss, model, weight)


def join_terms(
    task_loss: Tensor, model: nn.Module, weight: float | None = None, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`add_retention_loss`, with ``share`` of the configs' weights, as of one of several accumulated batches."""
    states = crossbar_states(model)
    alone = torch.zeros_like(task_loss.detach())
    if all(state.term is None and state.config.retention_loss != "consistency" for state in states):
        return task_loss, alone
    for state in _with_terms(model):
        own = state.config.retention_weight if weight is None else weight
        task_loss, value = _add(task_loss, state, own * share)
        alone = alone + value
    return task_loss, alone


def _of_all_processes(state: CrossbarState, layers: list[str], own: Tensor, several: int) -> tuple[Tensor, Tensor]:
    """The loss of the terms of all processes, whose layers need not be the same, as where some are dropped at random or
    tokens are routed; and its gradient with respect to this process's terms, (layers, 2)."""
    if several == 1:
        return _value_and_gradients(state, own)
    names = sorted(state.names | set(layers))
    rows = [names.index(name) for name in layers]
    every = own.new_zeros(len(names), 3)  # the last: how many processes called the layer
    every[rows] = torch.cat((own, torch.ones_like(own[:, :1])), 1)
    dist.all_reduce(every)
    called = every[:, 2].nonzero()[:, 0]
    if not len(called):
        raise RuntimeError(NO_TERMS)
    value, found = _value_and_gradients(state, every[called, :2])
    gradients = torch.zeros_like(every[:, :2])
    gradients[called] = found
    return value, gradients[rows] * several  # which are averaged over processes later


def _value_and_gradients(state: CrossbarState, terms: Tensor) -> tuple[Tensor, Tensor]:
    terms = terms.clone().requires_grad_(True)
    with torch.enable_grad():
        value = _reduce(state, terms)
    (gradients,) = torch.autograd.grad(value, terms)
    return value, gradients


def _add(task_loss: Tensor, state: CrossbarState, weight: float) -> tuple[Tensor, Tensor]:
    several = processes()
    forwards, collected = _collected(state, needed=several == 1)
    own = (
        _stacked(collected) if collected else torch.zeros(0, 2, dtype=torch.float32, device=task_loss.device)
    )  # other processes have some
    if collected and task_loss.requires_grad and not any(forward.grad for forward in forwards):
        raise RuntimeError(
            "the retention terms are of forwards without gradients, as a loss with cached gradients (GradCache) runs "
            "them before the ones of its backward: allowed is retention_loss='drift', 'noise' or 'none' there"
        )
    value, gradients = _of_all_processes(state, list(collected), own.detach(), several)
    if state.term == "output":
        state.ratios = {name: term.detach() for name, term in collected.items()}
    value = value.detach()
    state.settle(forwards)
    if not collected:
        return task_loss + weight * value.to(task_loss), value
    if not all(forward.attached for forward in forwards):
        pulled = (own * gradients).sum()
        return task_loss + weight * (value + pulled - pulled.detach()).to(task_loss), value
    rows = dict(zip(collected, gradients))
    pairs = [(scale, rows[name]) for forward in forwards for name, scale in forward.scales.items() if name in rows]
    scales, rows_of = zip(*pairs)
    return Add.apply(task_loss, value, weight, list(scales), torch.stack(rows_of)), value


def noise_to_signal(model: nn.Module) -> dict[str, float]:
    """Each layer's noise-to-signal ratio in the last forward in training mode that measured it, by layer name; empty
    if none did.

    Raises:
        ValueError: the model is not patched.
    """
    crossbar_states(model)
    ratios = measured_ratios(model)
    return {} if not ratios else dict(zip(ratios, torch.stack(list(ratios.values())).cpu().tolist()))


def measured_ratios(model: nn.Module) -> dict[str, Tensor]:
    """The same where they are, without waiting for the device."""
    pairs: dict[str, Tensor] = {}
    for name, layer in crossbar_layers(model).items():
        state, last = layer.crossbar, layer.crossbar.forward
        measured = last.ratios or (last.terms if state.term == "output" else {}) or state.ratios
        if layer.crossbar_name in measured:
            pairs[name] = measured[layer.crossbar_name]
    if not pairs:
        return {}
    values = _stacked(pairs).detach().float()
    return dict(zip(pairs, (values[:, 0] / values[:, 1].clamp(min=1e-30)).unbind()))


@contextmanager
def sampled_drift(
    model: nn.Module, kind: str | None = None, seed: int | None = None, strength: float = 1.0
) -> Iterator[None]:
    """Training forwards inside sample the retention error anew: ``W + m(W) + s(W) ε``, differentiable through both.
    Where they look at layers' inputs, so that numbers can follow the training (:func:`hf_reram.follow_training`), they
    run without ``torch.compile``, whose code cannot look.

    Args:
        kind: "drift" (the device's), "noise" (white, of the same power); None takes what ``config.retention_loss``
            says, and nothing is sampled where it says neither. The backward may come after the context.
        seed: so that all forwards inside, and those of other processes, see the same cells; None draws from torch's
            global generator.
        strength: share of the error's size that is sampled, from 0 to 1, as while a training warms up.

    Raises:
        ValueError: the model is not patched, another ``kind``, or a bad seed or strength.
    """
    if not is_finite(strength) or not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r}: allowed is a number from 0 to 1")
    seed = None if seed is None else checked_seed(seed)
    if kind not in (None, "drift", "noise"):
        raise ValueError(f"kind={kind!r}: allowed are 'drift', 'noise' and None")
    layers, states = crossbar_layers(model), crossbar_states(model)
    prefixes = dict.fromkeys(map(id, states), "")
    if len(states) > 1:
        prefixes |= {id(layer.crossbar): name.removesuffix(layer.crossbar_name) for name, layer in layers.items()}
    before = [(state, state.sampling) for state in states]
    for state in states:
        state.sampling = sampling(state.physics, kind, seed, prefixes[id(state)], strength)
    for same in arrays(layers):
        for name in same[1:]:
            layer = layers[name]
            holder = next(layers[other] for other in same if layers[other].crossbar is layer.crossbar)
            if layer.crossbar.sampling is not None:
                layer.crossbar.sampling.shared[layer.crossbar_name] = holder.crossbar_name
    for layer in layers.values():
        wanted = layer.crossbar.sampling
        if wanted is None or wanted.kind != "noise":
            continue
        if is_shard(layer.weight):
            layer.forget_white_noise()  # FSDP2 has the weights in the forward alone
        else:
            layer.white_noise_std()  # known before compiled code needs it
    looks = any(state.looks_uncompiled for state in states)
    try:
        with uncompiled() if looks else nullcontext():
            yield
    finally:
        for state, sampled in before:
            state.sampling = sampled


@torch.no_grad()
def hold_weights(model: nn.Module) -> None:
    """Move every weight that lies outside its cells' range back to its edge, in place; also those that FSDP2 has
    sharded, and what DeepSpeed's ZeRO 1 and 2 keep of them in float32. Where something else than a step of the
    optimizer has written weights that are cut now, as ``load_state_dict`` may before the first step, layers and shares
    are named in a warning; of sharded weights only a :class:`hf_reram.ReRAMTrainer` looks, before it trains.

    Raises:
        ValueError: the model is not patched.
        NotImplementedError: ZeRO 3 has taken the weights apart.
    """
    layers = patched_layers(model).values()
    for layer in layers:
        if is_learned(layer):
            hold_range(layer)
    trained = [layer for layer in layers if is_trained(layer)]
    unseen = (layer for layer in trained if not layer.is_held and not layer.crossbar.forward.compiled)
    warn_clipped(layer for layer in unseen if not is_shard(layer.weight))
    together: dict[Tensor, list[Any]] = {}
    for layer in trained:
        if isinstance(layer, Part):
            together.setdefault(parameter_of(layer), []).append(layer)
        else:
            _clamp_to_scale(layer.weight, _bound(layer))
    for weight, parts in together.items():
        _clamp_parts(weight, parts)
    for layer in trained:  # after all, which may share their weights
        layer.note_held()


def _bound(layer: CrossbarLayer) -> Tensor:
    """The largest weight that the cells can hold, so that it broadcasts against the weight."""
    scale = layer.held_scale()
    return scale / layer.along_inputs(layer.input_scale).to(scale.dtype) if layer.equalized else scale


def _clamp_parts(weight: Tensor, parts: list[Any]) -> None:
    """Of a parameter those parts that are layers; of one that has other forms than itself, all of it at once."""
    if not is_shard(weight) and all(master(weight) is None for master in MASTERS):
        for part in parts:
            _clamp(part.weight, _bound(part))
        return
    bound = torch.full(weight.shape, torch.inf, dtype=weight.dtype, device=parts[0].weight_scale.device)
    for part in parts:
        own = _bound(part).expand(part.weight.shape)
        bound[part.index] = own.mT if part.transposed else own
    _clamp_to_scale(weight, bound)


def _clamp_to_scale(weight: Any, scale: Tensor) -> None:
    masters = [found for master in MASTERS if (found := master(weight)) is not None]
    if is_shard(weight):  # FSDP2: shard the scale as the weight is, then clamp each rank's own part
        from torch.distributed.tensor import distribute_tensor

        full = scale.expand(weight.shape).contiguous()
        scale = distribute_tensor(full, weight.device_mesh, weight.placements).to_local()
        weight = weight.to_local()
    _clamp(weight, scale)
    for part, where in masters:
        _clamp(part, scale.expand(weight.shape).reshape(-1)[where].to(part))


def _clamp(weight: Tensor, scale: Tensor) -> None:
    torch.minimum(weight, scale, out=weight)
    torch.maximum(weight, -scale, out=weight)
