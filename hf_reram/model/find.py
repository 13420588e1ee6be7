"""A model's crossbar layers and the state that they share, found by walking the model."""

from torch import nn

from ..nn import CrossbarMixin
from ..nn.state import CrossbarState


def crossbar_layers(model: nn.Module) -> dict[str, CrossbarMixin]:
    """The model's crossbar layers by their qualified name in the patched model, whatever wraps it now (DDP, PEFT)."""
    return {m.crossbar_name: m for m in model.modules() if isinstance(m, CrossbarMixin)}


def crossbar_state(model: nn.Module) -> CrossbarState:
    """The state that the model's crossbar layers share.

    Raises:
        ValueError: the model is not patched.
    """
    for layer in crossbar_layers(model).values():
        return layer.crossbar
    raise ValueError(f"{type(model).__name__} has no crossbar layers: call patch_model(model, ReRAMConfig(...)) first")
