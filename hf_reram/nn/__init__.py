"""The array: layers that compute through simulated crossbars. Knows no Trainer."""

from .attention import CrossbarAttention
from .conv import CrossbarConv1d, CrossbarConv2d, CrossbarConv2dSame
from .experts import CrossbarExperts
from .layer import CrossbarLayer
from .linear import CrossbarConv1D, CrossbarLinear
from .parts import CrossbarPart, Holder, register_holder
from .places import Part
from .registry import register_crossbar

__all__ = [
    "CrossbarAttention",
    "CrossbarConv1D",
    "CrossbarConv1d",
    "CrossbarConv2d",
    "CrossbarConv2dSame",
    "CrossbarExperts",
    "CrossbarLayer",
    "CrossbarLinear",
    "CrossbarPart",
    "Holder",
    "Part",
    "register_crossbar",
    "register_holder",
]
