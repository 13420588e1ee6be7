"""Temperatures, as people write them: kelvins, or texts such as ``"85C"`` and ``"358K"``."""

import math
import re

from .checks import is_finite, plain, shown

COLDEST, HOTTEST = 200.0, 2000.0  # K; colder ones are degrees Celsius that were meant
ZERO_CELSIUS = 273.15
ROOM, ABOUT = 298.15, 10.0  # K, and how far from it a room is called one
_PATTERN = re.compile(r"\s*(-?[0-9]*\.?[0-9]+)\s*(K|°?C)?\s*")


def parse_temperature(temperature: str | float, name: str = "temperature") -> float:
    """Kelvins.

    Args:
        temperature: K as a number or text, or a text with one of the units K, C and °C. name: for the error.

    Raises:
        ValueError: the text is no temperature, or it lies outside 200 to 2000 K.
    """
    allowed = f"{COLDEST:g} to {HOTTEST:g} K, or a text such as '85C' or '358K'"
    temperature = plain(temperature)
    kelvin, unit = math.nan, None
    if isinstance(temperature, str):
        if match := _PATTERN.fullmatch(temperature):
            unit = match[2]
            kelvin = float(match[1]) + (ZERO_CELSIUS if unit in ("C", "°C") else 0.0)
    elif is_finite(temperature):
        kelvin = float(temperature)
    if COLDEST <= kelvin <= HOTTEST:
        return kelvin
    celsius = f"; {kelvin:g} °C? write '{kelvin:g}C'" if unit is None and kelvin < COLDEST else ""
    raise ValueError(f"{name}={shown(temperature)}: allowed is {allowed}{celsius}")


def is_room(kelvin: float) -> bool:
    """Whether a temperature [K] is about a room's."""
    return abs(kelvin - ROOM) <= ABOUT
