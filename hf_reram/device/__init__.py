"""The cell: pure functions of tensors, in µS, V, µA, s and K. Knows no nn.Module."""

from .cell import DeviceConfig, preset_names
from .time import format_time, parse_time

__all__ = ["DeviceConfig", "format_time", "parse_time", "preset_names"]
