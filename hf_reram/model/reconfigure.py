"""Change what a patched model is trained for, without putting its layers on crossbars anew."""

import weakref
from typing import Any

from torch import nn
from transformers.utils import logging

from ..config import TRAINING_FIELDS, ReRAMConfig
from ..device.checks import shown
from ..nn.state import ON_CHANGE, CrossbarState
from .find import crossbar_state, crossbar_states, patched_layers, unwrapped
from .hooks import ON_PATCH

logger = logging.get_logger(__name__)


def reconfigure(model: nn.Module, **changes: Any) -> nn.Module:
    """Change the loss, its weight and times, the temperature or the number of calibration batches of a patched model,
    in place; its calibration stays.

    Args:
        model: patched, or of parts that were: all get the changes.
        changes: ``retention_loss``, ``retention_weight``, ``retention_times``, ``temperature`` and
            ``calibration_batches``, as in :class:`hf_reram.ReRAMConfig`.

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
        state.adopt_config(config)
        if state.root is not None:
            for attach in ON_PATCH:
                attach(unwrapped(state.root), config)
    for layer in patched_layers(model).values():
        layer.forget_white_noise()
    return model


def watch(config: ReRAMConfig, model: nn.Module) -> None:
    """Have a config, of which a patched model has a copy, say that changing it does not change the model."""
    if crossbar_state(model).config is config:
        return
    state, earlier = weakref.ref(crossbar_state(model)), config.__dict__.get("_changed")

    def changed(config: ReRAMConfig, name: str, value: Any) -> None:
        if (found := state()) is not None and getattr(found.config, name) != value:
            _warn(found, name, value)
        if earlier is None:
            config.put(name, value)
        else:  # another model, which was patched with it before
            earlier(config, name, value)

    config.when_changed(changed)


def _changed(state: CrossbarState, name: str, value: Any) -> None:
    """A field of a patched model's own config is set: :func:`reconfigure`, where it can be changed."""
    config, root = state.config, state.root
    if name not in TRAINING_FIELDS or root is None:
        _warn(state, name, value)
        return
    reconfigure(root, **{name: value})
    config.put(name, getattr(state.config, name))  # for who still holds it


def _warn(state: CrossbarState, name: str, value: Any) -> None:
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


ON_CHANGE.append(_changed)
