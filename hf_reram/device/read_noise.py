"""The noise of a read, drawn anew each time."""

from .cell import DeviceConfig


def relative_read_noise(device: DeviceConfig, pairs: int = 1) -> float:
    """Spread of a column's read noise, averaged over the columns of a weight's pairs, in currents of a cell that is all
    on at ``read_voltage``: ``read_noise / (Δg · read_voltage · √pairs)``."""
    return device.read_noise / (device.g_range * device.read_voltage * pairs**0.5)
