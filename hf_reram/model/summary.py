"""How much of a model is on crossbars."""

from dataclasses import dataclass

from torch import nn

from ..nn import CrossbarLayer
from ..nn.parts import Holder
from ..nn.places import Part
from .find import arrays, crossbar_layers, crossbar_states, walk


@dataclass(frozen=True)
class CrossbarSummary:
    """What of a model is on crossbars.

    Attributes:
        device: name of the cell technology, or of several.
        layers: crossbar layers. cells: ReRAM cells, two a weight, pair and copy; layers that share a weight share
            its cells.
        weights: weights on crossbars. parameters: all of the model's parameters.
        calibrated: layers that have an input range. per_token: layers where each token (each image) has its own.
        digital: modules with matrices of their own that stay digital, by name and class.
    """

    device: str
    layers: int
    cells: int
    weights: int
    parameters: int
    calibrated: int
    digital: tuple[str, ...]
    per_token: int = 0

    @property
    def share(self) -> float:
        """Share of the model's parameters on crossbars."""
        return self.weights / max(self.parameters, 1)

    def __str__(self) -> str:
        own = f", {self.per_token} with an input range per token" if self.per_token else ""
        return (
            f"{self.layers} crossbar layers on {self.device} ({self.calibrated} calibrated{own}): {self.cells:,} cells "
            f"hold {self.weights:,} weights, {100 * self.share:.1f} % of the model's {self.parameters:,} parameters"
        )


def summarize(model: nn.Module) -> CrossbarSummary:
    """Count the model's crossbar layers and cells.

    Raises:
        ValueError: the model is not patched.
    """
    states, layers = crossbar_states(model), crossbar_layers(model)
    there = [layer for layer in layers.values() if layer.weight.device.type != "meta"]
    held = [layers[same[0]] for same in arrays(layers)]
    weights = sum(layer.weight.numel() for layer in held)
    ranges = sum(p.numel() for name, p in model.named_parameters() if name.endswith("input_range"))
    digital = tuple(
        f"{name} ({type(m).__name__})"
        for name, m in walk(model)
        if not isinstance(m, (CrossbarLayer, Holder)) and _has_matrices(m)
    )
    return CrossbarSummary(
        device=", ".join(dict.fromkeys(state.config.device.name for state in states)),
        layers=len(layers),
        cells=sum(max(layers[name].cells for name in same) for same in arrays(layers)),
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()) - ranges,
        calibrated=sum(layer.calibrated for layer in there),
        digital=digital,
        per_token=sum(layer.range_kind == "per_token" for layer in there),
    )


def _has_matrices(module: nn.Module) -> bool:
    return isinstance(module, Part) or any(p.dim() > 1 for p in module.parameters(recurse=False))
