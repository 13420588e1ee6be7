"""The tensors in what models are given and give back; tensors of which this process holds a part."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class NotFiniteError(ValueError):
    """An input of a model or of a layer holds NaN or infinite values."""


def is_shard(tensor: Any) -> bool:
    """Whether this process holds only a part of the tensor, as FSDP2 has it (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """The tensor, gathered from all processes where each holds a part of it; they must then all ask for it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def own_part(tensor: Any) -> Any:
    """What this process holds of the tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a model's outputs or inputs: in lists, tuples, dicts, and attributes of other objects."""
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = list(value.values())
    else:
        items = list(value) if isinstance(value, (list, tuple)) else list(getattr(value, "__dict__", {}).values())
    for item in items:
        yield from _tensors(item, seen)
