"""Input ranges that the optimizer learns, written to beside its steps: also where FSDP2 has sharded them, and in what
DeepSpeed's ZeRO 1 and 2 keep of them in float32."""

import torch
from torch import Tensor, nn

from ..model.hooks import MASTERS
from ..nn import CrossbarLayer
from ..nn.scalars import SMALLEST_RANGE
from ..nn.tensors import own_part


def is_learned(layer: CrossbarLayer) -> bool:
    """Whether the layer's input range is trained."""
    return isinstance(layer.input_range, nn.Parameter) and layer.input_range.requires_grad


@torch.no_grad()
def set_range(layer: CrossbarLayer, span: Tensor) -> None:
    """
    Args:
        span: the new range, one element.
    """
    for part in _parts(layer):
        part.copy_(span.reshape(-1).expand(part.numel()))


@torch.no_grad()
def hold_range(layer: CrossbarLayer) -> None:
    """Where a step has gone below 0, the smallest range: it must not become that of a layer that is not calibrated."""
    for part in _parts(layer):
        part.copy_(torch.where(part < 0, SMALLEST_RANGE, part))


def _parts(layer: CrossbarLayer) -> list[Tensor]:
    """What this process has of the range."""
    span = layer.input_range
    masters = [found[0] for master in MASTERS if (found := master(span)) is not None]
    return [own_part(span.detach()), *masters]
