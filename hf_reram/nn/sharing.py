"""Query, key and value read the same input: compute its sinh once.

The last driven input is remembered by a weak reference, so nothing lives longer for it. Its sinh too where autograd
keeps that for the backward; where nobody does, in evaluation, it is kept until its input goes or the next comes.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .ops.power import Pull

_LOCAL = threading.local()


def shared_drive(x: Tensor, key: tuple, compute) -> tuple[Tensor, Pull | None]:
    """``compute()``, or its last result if that was for the same tensor ``x``, unchanged, and the same ``key``."""
    if torch.compiler.is_compiling() or x.is_inference():
        return compute()
    key = (*key, x._version, torch.is_grad_enabled())
    last = getattr(_LOCAL, "last", None)
    if last is not None and last[0]() is x and last[1] == key:
        s = last[2]()
        if s is not None:
            return s, last[3]
    s, pull = compute()
    remembered: Callable[[], Tensor | None] = weakref.ref(s) if s.requires_grad else lambda: s
    _LOCAL.last = (weakref.ref(x, _forget), key, remembered, pull)
    return s, pull


def _forget(x: weakref.ref) -> None:
    last = getattr(_LOCAL, "last", None)
    if last is not None and last[0] is x:
        _LOCAL.last = None
