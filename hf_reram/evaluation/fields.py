"""What the fields of a report may hold, which may come from a stranger."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..device.checks import is_finite, plain, shown


class Kind(NamedTuple):
    """A kind of values: in words, whether a value is of it, and what becomes of it."""

    words: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def fields_of(data: Any, needed: Mapping[str, Kind], others: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The fields of an object, read.

    Args:
        needed, others: by name; what has another name is left out.

    Raises:
        ValueError: it is no object, lacks a field of ``needed``, or a value is of another kind.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{shown(data)}: allowed is an object of {sorted(needed)}")
    if missing := sorted(needed.keys() - data.keys()):
        raise ValueError(f"missing are the fields {missing}")
    kinds = {**needed, **(others or {})}
    for name, kind in kinds.items():
        if name in data and not kind.holds(data[name]):
            raise ValueError(f"{name}={shown(data[name])}: allowed is {kind.words}")
    return {name: kind.read(data[name]) for name, kind in kinds.items() if name in data}


def optional(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(
        f"{kind.words}, or null",
        lambda value: value is None or kind.holds(value),
        lambda value: None if value is None else kind.read(value),
    )


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _by_name(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _metric(value: Any) -> bool:
    """NaN and infinity, which an evaluation may find, are null and texts in JSON, or words of Python's own."""
    return value is None or value in ("inf", "-inf") or is_finite(value) or isinstance(value, float)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value) if isinstance(value, str) else plain(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", _texts, list)
NAMED_TEXTS = Kind("an object of texts", lambda value: _by_name(value, lambda v: isinstance(v, str)), dict)
LIST = Kind("a list", lambda value: isinstance(value, (list, tuple)), list)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping), dict)
OBJECTS = Kind("a list of objects", lambda value: LIST.holds(value) and all(map(OBJECT.holds, value)), list)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("an integer of at least 0", lambda value: _whole(value) and value >= 0)
SEED = Kind("an integer", _whole)
NUMBER = Kind("a finite number", is_finite, plain)
TIME = Kind("a number of seconds from 0 to 1e30", lambda value: is_finite(value) and 0 <= value <= 1e30, plain)
HEAT = optional(Kind("a number of kelvins above 0", lambda value: is_finite(value) and value > 0, plain))
NUMBERS = Kind(
    "an object of numbers",
    lambda value: _by_name(value, _metric),
    lambda value: {name: _number(number) for name, number in value.items()},
)
METRICS = Kind("an object of at least one number", lambda value: NUMBERS.holds(value) and bool(value), NUMBERS.read)
