"""What the text of a flag stands for."""

from ..device import DeviceConfig


def device_of(name: str) -> str | DeviceConfig:
    """A preset's name as it is, or the device in a JSON file.

    Raises:
        FileNotFoundError: no such file. ValueError: no device in it.
    """
    return DeviceConfig.from_json(name) if name.endswith(".json") else name


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
