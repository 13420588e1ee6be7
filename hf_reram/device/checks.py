"""Checks of numbers that come from a person or a file; each error names the field, the value and what is allowed."""

import math


def number(owner: str, name: str, value, minimum: float = -math.inf, exclusive: bool = False) -> float:
    """``value`` as a float if it is a finite number of at least (``exclusive``: above) ``minimum``."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < minimum or (exclusive and value == minimum):
        bound = "" if minimum == -math.inf else f" {'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(f"{owner}.{name}={value!r}: allowed is a finite number{bound}")
    return float(value)


def numbers(owner: str, name: str, values, minimum: float = -math.inf) -> tuple[float, ...]:
    """``values`` as a tuple of floats if it is a non-empty list of finite numbers of at least ``minimum``."""
    if not isinstance(values, (list, tuple)) or len(values) == 0:
        raise ValueError(f"{owner}.{name}={values!r}: allowed is a non-empty list of finite numbers")
    return tuple(number(owner, f"{name}[{i}]", value, minimum) for i, value in enumerate(values))
