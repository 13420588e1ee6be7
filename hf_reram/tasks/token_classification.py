"""Token classification, such as named entities: tagged words, entity-level F1, and the accuracy of tags.

Data sets are as on the Hub: a column of words, a list a sentence, and one of their tags, as names or numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..model.inputs import evaluating
from .data import batches_by_length
from .labels import classes_of, is_nameless, is_number
from .metrics.entities import are_entity_tags, entity_metrics

logger = logging.get_logger(__name__)

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "labels", "tags", "pos_tags")
IGNORED = -100  # at tokens that have no tag of their own
UNTAGGED = (-1, IGNORED)  # that data sets give words without a tag


def find_word_columns(
    dataset: Any,
    what: str = "dataset",
    id2label: Mapping[int, str] | None = None,
    label_names: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Names of the words' column and the tags' column; where there are several of tags, as of entities and of parts of
    speech, of the first one whose tags are the model's.

    Args:
        id2label: the model's names by number. label_names: see :func:`hf_reram.tasks.labels.classes_of`.

    Raises:
        ValueError: there are none, no row, rows with other numbers of words and tags, or several columns of tags and
            nothing tells which is the model's.
    """
    columns = dataset.column_names
    words = next((name for name in WORDS if name in columns), None)
    tags = [name for name in TAGS if name in columns]
    if words is None or not tags:
        lacking = f"words, one of {list(WORDS)}" if words is None else f"tags, one of {list(TAGS)}"
        raise ValueError(f"{what} has columns {columns}: missing are {lacking}")
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty: allowed is at least one sentence")
    column = tags[0] if len(tags) == 1 else _fitting(dataset, tags, id2label or {}, what, label_names)
    for i, (mine, theirs) in enumerate(zip(dataset[words], dataset[column])):
        if not (isinstance(mine, Sequence) and isinstance(theirs, Sequence)) or isinstance(mine, str):
            raise ValueError(f"{what} has {mine!r} and {theirs!r} in row {i}: allowed are lists of words and of tags")
        if len(mine) != len(theirs):
            raise ValueError(f"{what} has {len(mine)} words and {len(theirs)} tags in row {i}: allowed is a tag a word")
        if wrong := [word for word in mine if not isinstance(word, str)]:
            raise ValueError(f"{what} has {wrong[0]!r} among the words of row {i}: allowed are strings")
    return words, column


def _fitting(
    dataset: Any,
    columns: Sequence[str],
    id2label: Mapping[int, str],
    what: str,
    label_names: Mapping[str, str] | None,
) -> str:
    """The first of several columns whose tags are the model's by name; of a model without names, the one that has as
    many names as the model has classes."""
    if not is_nameless(id2label):
        for column in columns:
            tags = {tag for row in dataset[column] for tag in row or ()}
            if _names(dataset, column) is not None or any(not is_number(tag) for tag in tags):
                try:
                    tags_as_classes(dataset, column, id2label, label_names=label_names)
                except ValueError:
                    continue
                return column
    else:
        fitting = [column for column in columns if len(_names(dataset, column) or ()) == len(id2label) > 0]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError(
        f"{what} has several columns of tags, {list(columns)}, and nothing tells which of them the model's "
        f"{len(id2label)} classes are of: allowed is one of them, or tags with the model's names, "
        f"{sorted(id2label.values())[:5]}"
    )


def _names(dataset: Any, column: str) -> list[str] | None:
    """That the data set has for its tags' numbers."""
    return getattr(getattr(dataset.features[column], "feature", None), "names", None)


def tags_as_classes(
    dataset: Any,
    column: str,
    id2label: Mapping[int, str],
    what: str = "dataset",
    label_names: Mapping[str, str] | None = None,
) -> list[list[int]]:
    """The tags as numbers of the model's classes, see :func:`hf_reram.tasks.labels.classes_of`; :data:`IGNORED` where a
    word has none (-1 or -100).

    Args:
        column: of the tags. id2label: the model's names by number.
        label_names: see :func:`hf_reram.tasks.labels.classes_of`.

    Raises:
        ValueError: tags that are not the model's.
    """
    rows: list[list[Any]] = [[IGNORED if tag in UNTAGGED else tag for tag in row] for row in dataset[column]]
    found = {tag for row in rows for tag in row} - {IGNORED}
    classes = classes_of(found, _names(dataset, column), id2label, what, "tags", label_names) | {IGNORED: IGNORED}
    return [[classes[tag] for tag in row] for row in rows]


def word_labels(encoded: Any, tags: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each token of a tokenizer's sentences the tag of its word if it is the word's first, else :data:`IGNORED`."""
    labels = []
    for i, row in enumerate(tags):
        words = encoded.word_ids(i)
        first = [w is not None and w != before for before, w in zip([None, *words], words)]
        labels.append([row[w] if begins else IGNORED for w, begins in zip(words, first)])
    return labels


class TokenClassification:
    """Tags a data set's words with a model, each by its first token.

    Calling it with a model gives ``accuracy`` of the words' tags, in percent, and where the model's classes are tags of
    entities their ``f1``, ``precision`` and ``recall``, see :func:`hf_reram.tasks.entity_metrics`, so it fits
    :func:`hf_reram.evaluate_robustness`.

    Words behind ``max_length``, those of which the tokenizer makes no token and those without a tag are left out, and
    counted in a warning.

    Args:
        dataset: with columns of :data:`WORDS` and :data:`TAGS`. tokenizer: of the model, a fast one.
        id2label: the model's classes by number, ``model.config.id2label``.
        max_length: tokens of a sentence. batch_size: sentences a forward.
        label_names: see :func:`hf_reram.tasks.labels.classes_of`.

    Raises:
        ValueError: as :func:`find_word_columns` and :func:`tags_as_classes`, a tokenizer that does not know words, or
            no word is left.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        id2label: Mapping[int, str],
        max_length: int = 512,
        batch_size: int = 32,
        label_names: Mapping[str, str] | None = None,
    ):
        what = "the evaluation data"
        words, tags = find_word_columns(dataset, what, id2label, label_names)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell which word a token is of: allowed is a fast one"
            )
        classes = tags_as_classes(dataset, tags, id2label, what, label_names)
        self.names = [id2label[i] for i in range(len(id2label))]
        encoded = tokenizer(dataset[words][:], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = [np.array(row) for row in word_labels(encoded, classes)]
        self.first = [np.flatnonzero(row != IGNORED) for row in labels]
        self.wanted = [row[place] for row, place in zip(labels, self.first)]
        every, kept = sum(map(len, classes)), sum(map(len, self.wanted))
        if kept < every:
            logger.warning(
                "%s: %d of %d words are left out, without a tag or a token within %d",
                what,
                every - kept,
                every,
                max_length,
            )
        if not kept:
            raise ValueError(f"{what} hold no word of {every}: allowed is at least one")
        self.batches = batches_by_length(encoded, tokenizer, batch_size, padding_side="right")

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """
        Raises:
            ValueError: the model gives no logits of each token, or other ones.
        """
        found: list[Any] = [None] * len(self.wanted)
        with evaluating(model):
            device = next(model.parameters()).device
            for part, batch in self.batches:
                with torch.inference_mode():
                    output = model(**{key: value.to(device) for key, value in batch.items()})
                logits = getattr(output, "logits", None)
                if logits is None or logits.shape != (*batch["input_ids"].shape, len(self.names)):
                    raise ValueError(
                        f"{type(model).__name__} gives no logits of {len(self.names)} classes for each token"
                    )
                best = logits.argmax(-1).cpu().numpy()
                for row, sentence in zip(best, part):
                    found[sentence] = row[self.first[sentence]]
        mine, gold = ([[self.names[i] for i in row] for row in rows] for rows in (found, self.wanted))
        if are_entity_tags(self.names):
            return entity_metrics(mine, gold)
        return {"accuracy": 100 * float(np.mean(np.concatenate(found) == np.concatenate(self.wanted)))}
