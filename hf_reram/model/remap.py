"""Put a patched model on other cells, each of its parts that were patched by themselves for itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import SELECTION_FIELDS, TRAINING_FIELDS, ReRAMConfig
from .find import crossbar_layers, crossbar_states, unwrapped
from .patch import patch_model, take_layers_off, unpatch_model
from .reconfigure import reconfigure
from .select import lies_as


@dataclass(frozen=True)
class Move:
    """What has changed of a model that was put on other cells.

    Attributes:
        devices: names of those that its layers were on before, of parts that stay where they are none.
        differs: fields of the config, and "layers", in which it was put on them otherwise; none where all stays.
        added: layers on crossbars that were digital before. removed: digital layers that were on crossbars.
    """

    devices: list[str]
    differs: list[str]
    added: list[str]
    removed: list[str]

    def layers(self, before: str) -> str:
        """The layers that have changed, in words; empty where none has. ``before``: when they were otherwise."""
        found = []
        if self.added:
            found.append(f"these layers were digital {before}, and are on crossbars now: {', '.join(self.added)}")
        if self.removed:
            found.append(f"these layers were on crossbars {before}, and are digital now: {', '.join(self.removed)}")
        return "; ".join(found)


def put_on(model: nn.Module, asked: ReRAMConfig) -> Move:
    """Put a patched model on the cells that a config says, in place. Of parts that lie so already only loss, times,
    temperature and the number of calibration batches change; all others have to be calibrated. What is digital stays
    so, unless the config names other layers (``target_modules``, ``modules_to_not_convert``) than a part was patched
    with.

    Raises:
        ValueError: see :func:`hf_reram.patch_model`.
    """
    states, names = crossbar_states(model), list(crossbar_layers(model))
    own = [{name: getattr(state.config, name) for name in SELECTION_FIELDS} for state in states]
    named = {name: getattr(asked, name) for name in SELECTION_FIELDS}
    if not any(named.values()) or all(selection == named for selection in own):
        move = remap(model, [ReRAMConfig.from_dict({**asked.to_dict(), **selection}) for selection in own])
    elif lies_as(model, asked):
        move = Move([], [], [], [])
    else:
        configs = [state.config for state in states]
        patch_model(unpatch_model(model), asked)
        move = _move(model, names, [(config, asked) for config in configs])
    reconfigure(model, **{name: getattr(asked, name) for name in TRAINING_FIELDS})
    return move


def remap(model: nn.Module, configs: Sequence[ReRAMConfig]) -> Move:
    """Put each part of a patched model that was patched by itself on other cells, in place: the same layers of it.
    Parts whose cells stay as they are keep their calibration.

    Args:
        configs: what each of :func:`crossbar_states` is to have, with the layers that it has now.

    Raises:
        ValueError: see :func:`hf_reram.patch_model`.
    """
    states, names, base = crossbar_states(model), list(crossbar_layers(model)), unwrapped(model)
    inside = {module: place for place, module in enumerate(base.modules())}  # outer ones first
    parts: list[Any] = [base if state.root not in inside else state.root for state in states]
    pairs = [(state.config, config) for state, config in zip(states, configs)]
    moved = [part for part, (old, new) in zip(parts, pairs) if old.hardware() != new.hardware()]
    within = {module for part in moved for module in part.modules()}  # whose crossbars are taken off, all of them
    layers = [
        {name for name, layer in crossbar_layers(p).items() if layer.crossbar is s} for p, s in zip(parts, states)
    ]
    for part in moved:
        if crossbar_layers(part):
            unpatch_model(part)
    for i in sorted(range(len(parts)), key=lambda i: inside[parts[i]]):
        if parts[i] in within:
            patch_model(parts[i], configs[i])
            take_layers_off(parts[i], crossbar_layers(parts[i]).keys() - layers[i])
    return _move(model, names, [pair for part, pair in zip(parts, pairs) if part in within])


def _move(model: nn.Module, names: list[str], pairs: list[tuple[ReRAMConfig, ReRAMConfig]]) -> Move:
    """Of the layers that a model had on crossbars, and the configs before and after of what was moved."""
    now = crossbar_layers(model)
    added, removed = [name for name in now if name not in names], [name for name in names if name not in now]
    fields = [name for old, new in pairs for name in old.other_hardware(new) if name not in SELECTION_FIELDS]
    return Move(
        devices=list(dict.fromkeys(old.device.name for old, _ in pairs)),
        differs=list(dict.fromkeys([*fields, *(["layers"] if added or removed else [])])),
        added=added,
        removed=removed,
    )
