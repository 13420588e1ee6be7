"""Entity-level precision, recall and F1 of tagged words, as CoNLL's evaluation script and seqeval define them (Tjong
Kim Sang, De Meulder, CoNLL 2003): an entity counts where its first and last word and its kind are right."""

import re
from collections.abc import Sequence

_TAG = re.compile(r"O|[BIESLU]-.+", re.DOTALL)


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether names of classes are tags of entities: "O" and kinds behind B- (begin), I- (inside), E- or L- (end), S-
    or U- (single), as IOB1, IOB2, IOBES and BILOU have them."""
    return any(name != "O" for name in names) and all(_TAG.fullmatch(name) for name in names)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence: kind, first word, word after the last.

    One begins wherever none is under way, so that "I-PER" alone is an entity too, as CoNLL's script has it.
    """
    found, start = set(), None
    prefix = kind = ""
    for i, tag in enumerate([*tags, "O"]):
        was_prefix, was_kind = prefix, kind
        prefix, _, kind = tag.partition("-")
        ends = prefix in ("O", "B", "S", "U") or was_prefix in ("E", "S", "L", "U") or kind != was_kind
        if start is not None and ends:
            found.add((was_kind, start, i))
            start = None
        if start is None and prefix != "O":
            start = i
    return found


def entity_metrics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Figures over all entities of all sentences, in percent.

    Args:
        predictions, references: tags, a sequence a sentence.

    Returns:
        ``precision``, ``recall`` and ``f1``, 0 where there is nothing to divide by, and ``accuracy`` of the tags.

    Raises:
        ValueError: sentences differ in number or length, or there is no word.
    """
    if [len(tags) for tags in predictions] != [len(tags) for tags in references]:
        raise ValueError("predictions and references differ in sentences or their words: allowed is one tag a word")
    words = sum(map(len, references))
    if not words:
        raise ValueError("there is no word: allowed is at least one")
    right = guessed = wanted = same = 0
    for mine, theirs in zip(predictions, references):
        found, gold = entities(mine), entities(theirs)
        right, guessed, wanted = right + len(found & gold), guessed + len(found), wanted + len(gold)
        same += sum(a == b for a, b in zip(mine, theirs))
    return {
        "precision": 100 * right / max(guessed, 1),
        "recall": 100 * right / max(wanted, 1),
        "f1": 200 * right / max(guessed + wanted, 1),
        "accuracy": 100 * same / words,
    }
