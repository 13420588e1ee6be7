"""The numbers of each layer, from a few batches: ranges, weight scales, pairs per weight, sensitivity; batch norm."""

from .settle import calibrate

__all__ = ["calibrate"]
