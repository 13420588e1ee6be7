"""Text classification: single texts or pairs, with GLUE's columns, and accuracy; correlation where the label is a
number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..device.checks import shown
from ..model.inputs import evaluating
from .data import batches_by_length
from .labels import classes_of

logger = logging.get_logger(__name__)

# Names of the text columns, and of their second text where there are pairs, as in GLUE and the like.
TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("sentence",),
    ("text",),
)
LABELS = ("label", "labels")


def find_text_columns(dataset: Any, what: str = "dataset") -> tuple[tuple[str, ...], str]:
    """Names of the text columns, one or two, and of the label column.

    Raises:
        ValueError: there are none, or no row.
    """
    columns = dataset.column_names
    texts = next((names for names in TEXTS if set(names) <= set(columns)), None)
    label = next((name for name in LABELS if name in columns), None)
    if texts is None or label is None:
        lacking = f"labels, one of {list(LABELS)}" if texts else f"texts, one of {[list(names) for names in TEXTS]}"
        raise ValueError(f"{what} has columns {columns}: missing are {lacking}")
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty: allowed is at least one text")
    return texts, label


class TextClassification:
    """Classifies a data set's texts with a model: calling it with one gives ``accuracy``, or for a model with one
    output, a regression, ``pearson`` and ``mse``, so it fits :func:`hf_reram.evaluate_robustness`.

    Args:
        dataset: with columns of :data:`TEXTS` and :data:`LABELS`. tokenizer: of the model.
        classes: the model's outputs, 1 for a regression.
        max_length: tokens of a text or pair; longer ones are cut, and counted in a warning.
        batch_size: texts a forward.
        id2label: the model's names by number, ``model.config.id2label``; None: it has none.
        label_names: see :func:`hf_reram.tasks.labels.classes_of`; none for a regression.

    Raises:
        ValueError: columns are missing, labels are not the model's, or ``label_names`` for a regression.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        classes: int,
        max_length: int = 256,
        batch_size: int = 32,
        id2label: Mapping[int, str] | None = None,
        label_names: Mapping[str, str] | None = None,
    ):
        if classes == 1 and label_names:
            raise ValueError(f"label_names={shown(dict(label_names))} for a model with one output: allowed is None")
        texts, label = find_text_columns(dataset, "the evaluation data")
        self.classes, labels = classes, dataset[label][:]
        if classes > 1:
            names = getattr(dataset.features[label], "names", None)
            known = id2label or {i: f"LABEL_{i}" for i in range(classes)}
            numbers = classes_of(labels, names, known, "the evaluation data", label_names=label_names)
            labels = [numbers[value] for value in labels]
        self.labels = np.asarray(labels, dtype=np.float64)
        columns = [dataset[name][:] for name in texts]
        lengths = [len(ids) for ids in tokenizer(*columns, truncation=False, verbose=False)["input_ids"]]
        if cut := sum(length > max_length for length in lengths):
            logger.warning("%d of %d texts are longer than %d tokens, and cut there", cut, len(lengths), max_length)
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        self.batches = batches_by_length(encoded, tokenizer, batch_size)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """
        Raises:
            ValueError: the model gives no logits, or other ones.
        """
        found = np.zeros((len(self.labels), self.classes))
        with evaluating(model):
            device = next(model.parameters()).device
            for part, batch in self.batches:
                with torch.inference_mode():
                    output = model(**{key: value.to(device) for key, value in batch.items()})
                logits = getattr(output, "logits", None)
                if logits is None or logits.shape != (len(part), self.classes):
                    raise ValueError(f"{type(model).__name__} gives no logits of {self.classes} classes for each text")
                found[part] = logits.float().cpu().numpy()
        if self.classes > 1:
            return {"accuracy": 100 * float((found.argmax(1) == self.labels).mean())}
        values = found[:, 0]
        known = values.std() > 0 and self.labels.std() > 0
        pearson = 100 * float(np.corrcoef(values, self.labels)[0, 1]) if known else float("nan")
        return {"pearson": pearson, "mse": float(((values - self.labels) ** 2).mean())}
