"""The tensors in what models are given and give back."""

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a model's outputs or inputs."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        value = list(vars(value).values()) if is_dataclass(value) else []
    return [t for item in value for t in tensors_of(item)]
