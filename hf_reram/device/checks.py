"""Checks of numbers that come from a person or a file; each error names the field, the value and what is allowed."""

import json
import math
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# No quantity of a cell is near it, in µS, V, s, K or eV.
LARGEST = 1e12
LONGEST_POLYNOMIAL = 32  # coefficients; powers beyond are lost in a float
DEEPEST = 32  # levels of lists and objects in JSON
LARGEST_LEVEL = 10_000_000  # values on one of them

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 200
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = 8


def shown(value: Any) -> str:
    """A value as an error shows it, cut where it is long or deep."""
    return _short.repr(value)


def some(names: Iterable[str]) -> str:
    """Names as an error lists them, cut where there are many."""
    names = list(names)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def is_finite(value: Any) -> bool:
    """Whether a value is a number, Python's or NumPy's, and finite as a float."""
    value = plain(value)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and abs(value) <= sys.float_info.max


def refuse_deep(owner: str, value: Any, largest: int = LARGEST_LEVEL) -> None:
    """Refuse lists and objects within one another that would be too much to copy or to print.

    Raises:
        ValueError: there are more than 32 levels, or more than ``largest`` values on one.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple))]
        if sum(map(len, inner)) > largest:
            raise ValueError(f"{owner} holds more than {largest} values: allowed are fewer")
        level = [value for values in inner for value in values]
        if not level:
            return
    raise ValueError(f"{owner} is nested more than {DEEPEST} levels deep: allowed are lists and objects less deep")


def parse_json(text: str, owner: str) -> Any:
    """JSON from a stranger.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"{owner} is nested too deeply: allowed are {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{owner} is not valid JSON: {error}") from error
    refuse_deep(owner, data)
    return data


def read_json(path: str | Path) -> Any:
    """The JSON in a file; see :func:`parse_json`.

    Raises:
        OSError: no such file. ValueError: as :func:`parse_json`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return parse_json(text, str(path))


def number(owner: str, name: str, value, minimum: float = -math.inf, exclusive: bool = False) -> float:
    """``value`` as a float if it is a finite number of at least (``exclusive``: above) ``minimum``, and of no absurd
    size."""
    value = plain(value)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not good or value < minimum or (exclusive and value == minimum):
        bound = "" if minimum == -math.inf else f" {'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(
            f"{owner}.{name}={shown(value)}: allowed is a finite number{bound}, at most {LARGEST:g} in size"
        )
    return float(value)


def flag(owner: str, name: str, value) -> bool:
    """``value`` as Python's if it is True or False."""
    if not isinstance(plain(value), bool):
        raise ValueError(f"{owner}.{name}={shown(value)}: allowed is True or False")
    return plain(value)


def plain(value: Any) -> Any:
    """A NumPy number, boolean or text as Python's, an array as lists of them."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    value = value.item() if isinstance(value, np.generic) else value
    return float(value) if isinstance(value, np.longdouble) else value


def numbers(owner: str, name: str, values, minimum: float = -math.inf) -> tuple[float, ...]:
    """``values`` as a tuple of floats if it is a non-empty list of finite numbers of at least ``minimum``."""
    values = plain(values)
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 1000:
        raise ValueError(f"{owner}.{name}={shown(values)}: allowed is a non-empty list of finite numbers, at most 1000")
    return tuple(number(owner, f"{name}[{i}]", value, minimum) for i, value in enumerate(values))


def polynomial(owner: str, name: str, values) -> tuple[float, ...]:
    """``values`` as coefficients of a polynomial, of which there may be 32."""
    found = numbers(owner, name, values)
    if len(found) > LONGEST_POLYNOMIAL:
        raise ValueError(f"{owner}.{name} has {len(found)} coefficients: allowed are at most {LONGEST_POLYNOMIAL}")
    return found
