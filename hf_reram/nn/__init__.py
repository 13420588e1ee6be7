"""The array: layers that compute through simulated crossbars. Knows no Trainer."""

from .conv import CrossbarConv1d, CrossbarConv2d, CrossbarConv2dSame
from .layer import CrossbarLayer
from .linear import CrossbarConv1D, CrossbarLinear
from .registry import register_crossbar

__all__ = [
    "CrossbarConv1D",
    "CrossbarConv1d",
    "CrossbarConv2d",
    "CrossbarConv2dSame",
    "CrossbarLayer",
    "CrossbarLinear",
    "register_crossbar",
]
