"""The array: layers that compute through simulated crossbars. Knows no Trainer."""

from .conv import CrossbarConv2d, CrossbarConv2dSame
from .layer import CrossbarMixin
from .linear import CrossbarConv1D, CrossbarLinear

__all__ = ["CrossbarConv1D", "CrossbarConv2d", "CrossbarConv2dSame", "CrossbarLinear", "CrossbarMixin"]
