"""A data set's labels as a model's classes: by name where both have names, else by number."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..device.checks import shown

logger = logging.get_logger(__name__)

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
    label_names: Mapping[str, str] | None = None,
) -> dict[Any, int]:
    """The model's class of each label. Case and what separates words do not count in names, and where all of the data
    set's each begin another one of the model's, as neg and pos those of NEGATIVE and POSITIVE, a warning says that they
    are taken for these. Names that are numbers are taken as such, unless the model's names say something else.

    Args:
        labels: those that occur, numbers or names.
        names: the data set's, of its numbers; None where it has none.
        id2label: the model's names by number.
        what, noun: for errors.
        label_names: by name (or number) of the data set the model's name (or number) for it; others have to be the
            model's by name. None: nothing is told.

    Raises:
        ValueError: labels that are not the model's: names of others where both have names, numbers outside of the
            classes, names that are numbers and could be either, or, of a model without names, another number of names.
    """
    id2label = {int(number): name for number, name in id2label.items()}
    found = list(dict.fromkeys(_hashable(label, what, noun) for label in labels))
    by_name = names is not None or any(isinstance(label, str) for label in found)
    if names is not None and (bad := [label for label in found if _number(label, len(names)) is None]):
        raise ValueError(f"{what} has {noun} {shown(bad)}: allowed are 0 to {len(names) - 1}, those with names")
    spoken = found if names is None else [names[int(label)] for label in found]
    if label_names:
        return _as_told(found, spoken, names, id2label, what, noun, label_names)
    if by_name:
        classes = _by_name(found, spoken, id2label)
        if None not in classes:
            return dict(zip(found, classes))
        nameless, every = is_nameless(id2label), spoken if names is None else names
        if names is None:
            numbered = all(map(is_number, found)) and set(classes) == {None}
        else:
            numbered = is_nameless(dict(enumerate(names)))
        if not nameless:
            begun = _by_beginning(every, id2label)
            named = {label: begun[name] for label, name in zip(found, spoken)} if begun else {}
            counted = {label: _number(label, len(id2label)) for label in found} if numbered else {}
            if named and (not counted or None in counted.values()):
                meant = shown({name: id2label[number] for name, number in begun.items()})
                logger.warning_once(f"{what} has {noun} that begin the model's, and are taken for these: {meant}")
                return named
            if not counted or (named and named != counted):
                unknown = [name for name, number in zip(spoken, classes) if number is None]
                raise _strange(unknown, every, id2label, what, noun)
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


def is_number(label: Any) -> bool:
    """Whether a label is a whole number, also as text."""
    try:
        return float(label).is_integer()
    except (TypeError, ValueError):
        return False


def _strange(unknown: list[Any], every: Sequence[Any], id2label: Mapping[int, str], what: str, noun: str) -> ValueError:
    """For names that are not the model's."""
    return ValueError(
        f"{what} has {noun} {shown(unknown)} among its {shown(sorted(set(map(str, every))))}: allowed are the model's, "
        f"{shown(sorted(id2label.values()))}, or label_names that say which of these each is "
        f"(--label-names '{unknown[0]}=...' of hf-reram eval)"
    )


def _as_told(
    labels: list[Any],
    spoken: Sequence[Any],
    names: Sequence[str] | None,
    id2label: Mapping[int, str],
    what: str,
    noun: str,
    label_names: Mapping[str, str],
) -> dict[Any, int]:
    """:func:`classes_of` with ``label_names``.

    Raises:
        ValueError: these name what the data set or the model does not have, or there are labels beside them that are
            not the model's by name.
    """
    if names is not None and (
        strange := [name for name in label_names if name not in names]
    ):  # else they may not occur
        raise ValueError(f"label_names name {shown(strange)}: allowed are the names of {what}, {shown(sorted(names))}")
    told: dict[str, int | None] = {}
    for name, theirs in label_names.items():
        (number,) = _by_name([None], [theirs], id2label)
        told[name] = _number(theirs, len(id2label)) if number is None else number
        if told[name] is None:
            raise ValueError(
                f"label_names take {name!r} for {theirs!r}: allowed are the model's names, "
                f"{shown(sorted(id2label.values()))}, and numbers from 0 to {len(id2label) - 1}"
            )
    words = [str(int(float(name))) if not isinstance(name, str) and is_number(name) else name for name in spoken]
    found = [told.get(word, number) for word, number in zip(words, _by_name(labels, words, id2label))]
    if unknown := [word for word, number in zip(words, found) if number is None]:
        raise _strange(unknown, words if names is None else names, id2label, what, noun)
    return {label: number for label, number in zip(labels, found) if number is not None}


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
        exact.setdefault(name, []).append(number)
        loose.setdefault(_plain(name), []).append(number)
    classes: list[int | None] = []
    for label, name in zip(labels, spoken):
        found = (exact.get(name) or loose.get(_plain(name)) or []) if isinstance(name, str) else []
        classes.append(label if label in found else found[0] if len(found) == 1 else None)
    return classes


def _by_beginning(names: Sequence[Any], id2label: Mapping[int, str]) -> dict[str, int]:
    """For each of a data set's names the one class whose name it is or begins; empty unless all have one of their
    own."""
    ordered = sorted((_plain(name), number) for number, name in id2label.items())
    found: dict[str, int] = {}
    for name in names:
        word = _plain(name) if isinstance(name, str) else ""
        first = bisect_left(ordered, (word,))
        begun = [pair for pair in ordered[first : first + 2] if pair[0].startswith(word)]
        same = [pair for pair in begun if pair[0] == word] or begun
        if not word or len(same) != 1:
            return {}
        found[name] = same[0][1]
    return found if len(set(found.values())) == len(names) else {}


def _plain(name: str) -> str:
    return SEPARATORS.sub(" ", name.casefold()).strip()
