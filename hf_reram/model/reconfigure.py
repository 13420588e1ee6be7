"""Change what a patched model is trained for, without putting its layers on crossbars anew."""

from typing import Any

from torch import nn

from ..config import TRAINING_FIELDS, ReRAMConfig
from ..nn.physics import Physics
from .find import crossbar_states, patched_layers, unwrapped
from .hooks import ON_PATCH


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
        state.physics = Physics.of(config)
        if state.root is not None:
            for attach in ON_PATCH:
                attach(unwrapped(state.root), config)
    for layer in patched_layers(model).values():
        layer.forget_white_noise()
    return model
