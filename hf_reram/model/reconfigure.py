"""Change what a patched model is trained for, without putting its layers on crossbars anew."""

from typing import Any

from torch import nn
from transformers.utils import logging

from ..config import TRAINING_FIELDS, ReRAMConfig
from ..device.checks import shown
from ..nn import state as nn_state
from ..nn.physics import Physics
from ..nn.state import CrossbarState
from .find import crossbar_state, crossbar_states, patched_layers, unwrapped
from .hooks import ON_PATCH, ON_UNTENDED

logger = logging.get_logger(__name__)


def reconfigure(model: nn.Module, **changes: Any) -> nn.Module:
    """Change the loss, its weight, warm-up and times, the temperature or the number of calibration batches of a patched
    model, in place; its calibration stays.

    Args:
        model: patched, or of parts that were: all get the changes.
        changes: ``retention_loss``, ``retention_weight``, ``retention_warmup``, ``retention_times``, ``temperature``
            and ``calibration_batches``, as in :class:`hf_reram.ReRAMConfig`.

    Raises:
        ValueError: the model is not patched, a wrong value, or a field that says how weights lie on the cells: these
            need ``unpatch_model``, ``patch_model`` and ``calibrate``.
    """
    if fixed := sorted(changes.keys() - set(TRAINING_FIELDS)):
        raise ValueError(
            f"reconfigure({', '.join(fixed)}=...): allowed are {list(TRAINING_FIELDS)}; anything else needs "
            "unpatch_model, patch_model with the new config, and calibrate"
        )
    states = crossbar_states(model)
    configs = [ReRAMConfig.from_dict({**state.config.to_dict(), **changes}) for state in states]
    for state, config in zip(states, configs):
        for name in changes:  # the same object, which others hold
            state.config.put(name, getattr(config, name))
        state.physics = Physics.of(state.config)
        if state.root is not None:
            for attach in ON_PATCH:
                attach(unwrapped(state.root), state.config)
    for layer in patched_layers(model).values():
        layer.forget_white_noise()
    return model


def watch(config: ReRAMConfig, model: nn.Module) -> None:
    """Have a config, of which a patched model has a copy, say that changing it does not change the model."""
    config.tell(crossbar_state(model))


def _heard(state: CrossbarState, config: ReRAMConfig, name: str, value: Any) -> bool:
    """A field of a patched model's own config is set: :func:`reconfigure`, where it can be changed. Of a config that
    was handed over, it has no effect on the model."""
    own, root = config is state.config, state.root
    if own and name in TRAINING_FIELDS and root is not None:
        reconfigure(root, **{name: value})
    elif value != getattr(state.config, name):
        way = (
            f"hf_reram.reconfigure(model, {name}=...)"
            if name in TRAINING_FIELDS
            else "unpatch_model, patch_model with the new config, and calibrate"
        )
        logger.warning(
            "ReRAMConfig.%s=%s has no effect on the model that was patched with %s: it takes %s to change it",
            name,
            shown(value),
            shown(getattr(state.config, name)),
            way,
        )
    return own


def _ask_who_trains(state: CrossbarState) -> None:
    for ask in ON_UNTENDED:
        ask(state)


nn_state.on_change, nn_state.on_untended = _heard, _ask_who_trains
