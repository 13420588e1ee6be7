"""A data set's labels as a model's classes: by name where both have names, else by number."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..device.checks import shown

SEPARATORS = re.compile(r"[\s_-]+")


def is_nameless(id2label: Mapping[int, str]) -> bool:
    """Whether names say no more than their numbers, as those that transformers gives by itself."""
    return all(name in (f"LABEL_{number}", str(number)) for number, name in id2label.items())


def classes_of(
    labels: Iterable[Any],
    names: Sequence[str] | None,
    id2label: Mapping[int, str],
    what: str = "dataset",
    noun: str = "labels",
) -> dict[Any, int]:
    """The model's class of each label. Case and what separates words do not count in names.

    Args:
        labels: those that occur, numbers or names.
        names: the data set's, of its numbers; None where it has none.
        id2label: the model's names by number.
        what, noun: for errors.

    Raises:
        ValueError: labels that are not the model's: names of others where both have names, numbers outside of the
            classes, or, of a model without names, another number of names.
    """
    found = list(dict.fromkeys(_hashable(label, what, noun) for label in labels))
    by_name = names is not None or any(isinstance(label, str) for label in found)
    if names is not None and (bad := [label for label in found if _number(label, len(names)) is None]):
        raise ValueError(f"{what} has {noun} {shown(bad)}: allowed are 0 to {len(names) - 1}, those with names")
    if by_name:
        spoken = found if names is None else [names[int(label)] for label in found]
        classes = _by_name(found, spoken, id2label)
        if None not in classes:
            return dict(zip(found, classes))
        nameless = is_nameless(id2label)
        if not nameless and (names is None or not is_nameless(dict(enumerate(names)))):
            unknown = [name for name, number in zip(spoken, classes) if number is None]
            raise ValueError(
                f"{what} has {noun} {shown(unknown)} among its {shown(sorted(set(map(str, names or spoken))))}: "
                f"allowed are the model's, {shown(sorted(id2label.values()))}"
            )
        if names is not None and len(names) != len(id2label):
            raise ValueError(
                f"{what} has {len(names)} classes and the model {len(id2label)}: allowed is the same number where "
                f"{'the model' if nameless else 'the data set'} has no names for them"
            )
    numbers = {label: _number(label, len(id2label)) for label in found}
    if unknown := [label for label, number in numbers.items() if number is None]:
        raise ValueError(
            f"{what} has {noun} {shown(unknown)}: allowed are 0 to {len(id2label) - 1}, the model's {len(id2label)} "
            "classes"
        )
    return {label: number for label, number in numbers.items() if number is not None}


def _hashable(label: Any, what: str, noun: str) -> Any:
    if isinstance(label, (list, dict)):
        raise ValueError(f"{what} has {shown(label)} among its {noun}: allowed is one number or name for each")
    return label


def _number(label: Any, classes: int) -> int | None:
    """A label that is the number of a class."""
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return int(value) if value in range(classes) else None


def _by_name(labels: list[Any], spoken: Sequence[Any], id2label: Mapping[int, str]) -> list[int | None]:
    """The class of each name, None where it is none, or several as ImageNet's two cranes; of several the one of the
    label's own number."""
    exact: dict[str, list[int]] = {}
    loose: dict[str, list[int]] = {}
    for number, name in id2label.items():
        exact.setdefault(name, []).append(int(number))
        loose.setdefault(_plain(name), []).append(int(number))
    classes: list[int | None] = []
    for label, name in zip(labels, spoken):
        found = (exact.get(name) or loose.get(_plain(name)) or []) if isinstance(name, str) else []
        classes.append(label if label in found else found[0] if len(found) == 1 else None)
    return classes


def _plain(name: str) -> str:
    return SEPARATORS.sub(" ", name.casefold()).strip()
