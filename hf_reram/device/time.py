"""Times since programming, as people write them: ``"1s"``, ``"1h"``, ``"1d"``, ``"10y"``, or seconds."""

import math
import re

from .checks import is_finite, plain, shown

YEAR = 365.25 * 86400.0
UNITS = {
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 7 * 86400.0,
    "mo": YEAR / 12,
    "y": YEAR,
}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-z]+)?\s*")


def parse_time(time: str | float) -> float:
    """Seconds since programming.

    Args:
        time: seconds as a number, or a number with one of the units s, min, h, d, w, mo (a twelfth of a year), y.

    Raises:
        ValueError: the text is no such time, or the time is negative, infinite or NaN.
    """
    time = plain(time)
    allowed = f"a number of seconds >= 0 or a text such as '1s', '1h', '1d', '10y' (units: {', '.join(UNITS)})"
    if isinstance(time, str):
        match = _PATTERN.fullmatch(time)
        if match is None or (match[2] or "s") not in UNITS:
            raise ValueError(f"time={shown(time)} is not a time: allowed is {allowed}")
        seconds = float(match[1]) * UNITS[match[2] or "s"]
    elif not is_finite(time):
        raise ValueError(f"time={shown(time)} is not a time: allowed is {allowed}")
    else:
        seconds = float(time)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"time={shown(time)} is not a time: allowed is {allowed}")
    return seconds


def format_time(seconds: float) -> str:
    """The shortest human label of a time: ``86400`` becomes ``"1d"``; the inverse of :func:`parse_time`."""
    for unit in ("y", "mo", "w", "d", "h", "min"):
        count = seconds / UNITS[unit]
        if count >= 1 and abs(count - round(count)) < 1e-9 * count:
            return f"{round(count)}{unit}"
    return f"{seconds:g}s"
