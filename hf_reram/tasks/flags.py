"""What the text of a flag stands for."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ..device import DeviceConfig


def device_of(name: str) -> str | DeviceConfig:
    """A preset's name as it is, or the device in a JSON file.

    Raises:
        FileNotFoundError: no such file. ValueError: no device in it.
    """
    return DeviceConfig.from_json(name) if name.endswith(".json") else name


def mapping_flags(
    range_shrink: str | None = None,
    weight_clip: str | None = None,
    redundancy: float | None = None,
    input_range: str | None = None,
) -> dict[str, Any]:
    """How weights lie on the cells, as fields of :class:`hf_reram.ReRAMConfig`: those flags alone that were given, also
    with the field's default.

    Raises:
        ValueError: as :func:`number_or_word`.
    """
    given: dict[str, Any] = {}
    if range_shrink is not None:
        given["range_shrink"] = number_or_word(range_shrink, "range_shrink", {"auto": "auto"})
    if weight_clip is not None:
        given["weight_clip"] = number_or_word(weight_clip, "weight_clip", {"auto": "auto", "none": None})
    plain = {"redundancy": redundancy, "input_range": input_range}
    return given | {name: value for name, value in plain.items() if value is not None}


def label_names_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """``["neg=NEGATIVE,pos=POSITIVE"]``, one text or several, as ``{"neg": "NEGATIVE", "pos": "POSITIVE"}``: what comes
    behind a comma without "=" belongs to the name before. A text that is a JSON object may hold names with any signs.

    Raises:
        ValueError: neither.
    """
    found: dict[str, str] = {}
    for text in pairs or ():
        if text.lstrip().startswith("{"):
            try:
                given = json.loads(text)
            except ValueError as error:
                raise ValueError(f"label_names={text!r} is no JSON object: {error}") from error
        else:
            given = dict(_pair(part) for part in re.split(r",(?=[^,]*=)", text))
        found |= {str(name): str(theirs) for name, theirs in given.items()}
    return found


def _pair(text: str) -> tuple[str, str]:
    name, sign, theirs = (part.strip() for part in text.partition("="))
    if not (name and sign and theirs):
        raise ValueError(f"label_names={text!r}: allowed are pairs as neg=NEGATIVE,pos=POSITIVE, or a JSON object")
    return name, theirs


def number_or_word(text: str, name: str, words: dict[str, str | None]) -> float | str | None:
    """A flag's number, or what one of ``words`` stands for.

    Raises:
        ValueError: neither.
    """
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: allowed are a number and {sorted(words)}") from None
