"""Metrics as ``evaluate.Metric`` classes that need no download."""

from .squad_v2 import SquadV2

__all__ = ["SquadV2"]
