"""Checks of numbers that come from a person or a file; each error names the field, the value and what is allowed."""

import math
from typing import Any

import numpy as np

# No quantity of a cell is near it, in µS, V, s, K or eV.
LARGEST = 1e12


def number(owner: str, name: str, value, minimum: float = -math.inf, exclusive: bool = False) -> float:
    """``value`` as a float if it is a finite number of at least (``exclusive``: above) ``minimum``, and of no absurd
    size."""
    value = plain(value)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not good or value < minimum or (exclusive and value == minimum):
        bound = "" if minimum == -math.inf else f" {'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(f"{owner}.{name}={value!r}: allowed is a finite number{bound}, at most {LARGEST:g} in size")
    return float(value)


def plain(value: Any) -> Any:
    """A NumPy number as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def numbers(owner: str, name: str, values, minimum: float = -math.inf) -> tuple[float, ...]:
    """``values`` as a tuple of floats if it is a non-empty list of finite numbers of at least ``minimum``."""
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 1000:
        raise ValueError(f"{owner}.{name}={values!r}: allowed is a non-empty list of finite numbers, at most 1000")
    return tuple(number(owner, f"{name}[{i}]", value, minimum) for i, value in enumerate(values))
