"""Metrics as ``evaluate.Metric`` classes that need no download."""

from .squad_v2_metric import SquadV2

__all__ = ["SquadV2"]
