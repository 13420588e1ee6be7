"""Metrics as ``evaluate.Metric`` classes that need no download."""

from typing import TYPE_CHECKING

from ...lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from .entities_metric import EntityF1
    from .squad_v2_metric import SquadV2

__all__ = ["EntityF1", "SquadV2"]

__getattr__, __dir__ = _lazy_names(__name__, {"entities_metric": ["EntityF1"], "squad_v2_metric": ["SquadV2"]})
