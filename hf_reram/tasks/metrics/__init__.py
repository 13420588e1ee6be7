"""Metrics as ``evaluate.Metric`` classes that need no download."""

from typing import TYPE_CHECKING

from ...lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from .squad_v2_metric import SquadV2

__all__ = ["SquadV2"]

__getattr__, __dir__ = _lazy_names(__name__, {"squad_v2_metric": ["SquadV2"]})
