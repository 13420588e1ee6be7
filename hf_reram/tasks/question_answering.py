"""Extractive question answering on SQuAD v2: long contexts as overlapping windows, n-best spans, no answer.

Data sets are as on the Hub (``rajpurkar/squad_v2``): columns ``id``, ``question``, ``context`` and ``answers``, a dict
of ``text`` and ``answer_start``, empty where there is no answer.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..device.checks import shown
from ..integrations.spans import best_spans, windows
from ..model.inputs import evaluating
from .data import batches_by_length
from .metrics.squad_v2 import squad_v2_metrics

logger = logging.get_logger(__name__)

COLUMNS = ("id", "question", "context", "answers")


def check_squad(dataset, what: str = "dataset", columns: Sequence[str] = COLUMNS) -> None:
    """Refuse a data set that is not SQuAD-like.

    Raises:
        ValueError: it is empty or lacks one of ``columns``, or a question or context is no text; names its row.
    """
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{what} has columns {dataset.column_names}: missing are {missing}")
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty: allowed is at least one question")
    for name in ("question", "context"):
        for i, text in enumerate(dataset[name]):
            if not isinstance(text, str):
                raise ValueError(f"{what} has {shown(text)} as the {name} of row {i}: allowed is a text")
    if "answers" not in columns:
        return
    answers = dataset[0]["answers"]
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        raise ValueError(
            f"{what} has answers such as {answers!r}: allowed is a dict of 'text' and 'answer_start' lists"
        )


def training_features(dataset, tokenizer, max_length: int = 384, stride: int = 128, labels: bool = True):
    """Windows with the token positions of the first gold answer; the first token where a window holds no answer.

    Questions whose gold text does not stand at its ``answer_start`` are left out, with a warning that counts them.

    Args:
        labels: False makes windows alone, of questions and contexts that need no answers.

    Returns:
        a data set of ``input_ids``, ``attention_mask``, perhaps ``token_type_ids``, and with labels
        ``start_positions`` and ``end_positions``; unpadded.

    Raises:
        ValueError: as :func:`check_squad`; a tokenizer without character offsets; no question is left.
    """
    check_squad(dataset, "the training data", COLUMNS if labels else ("question", "context"))
    if labels:
        dataset = _with_gold_in_context(dataset)

    def features(rows):
        encoded = windows(tokenizer, rows, max_length, stride)
        owners = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        if not labels:
            return dict(encoded)
        starts, ends = [], []
        for i, owner in enumerate(owners):
            answers = rows["answers"][owner]
            span = None
            if answers["text"]:
                first = answers["answer_start"][0]
                span = _tokens_of(first, first + len(answers["text"][0]), offsets[i], encoded.sequence_ids(i))
            start, end = span or (0, 0)
            starts.append(start)
            ends.append(end)
        return {**encoded, "start_positions": starts, "end_positions": ends}

    return dataset.map(features, batched=True, remove_columns=dataset.column_names, desc="training windows")


def _with_gold_in_context(dataset):
    good = dataset.filter(_gold_stands_in_context)
    if len(good) < len(dataset):
        logger.warning(
            "%d of %d training questions are left out: their gold answer does not stand in the context where it should",
            len(dataset) - len(good),
            len(dataset),
        )
    if len(good) == 0:
        raise ValueError("the training data hold no question whose gold answer stands in its context")
    return good


def _gold_stands_in_context(row) -> bool:
    answers = row["answers"]
    if not answers["text"]:
        return True
    text, start = answers["text"][0], answers["answer_start"][0]
    return bool(text) and start >= 0 and row["context"][start : start + len(text)] == text


def _tokens_of(first: int, last: int, offsets, sequence_ids) -> tuple[int, int] | None:
    """The tokens that cover the context's characters [first, last), or None if the window does not hold them all."""
    inside = [k for k, sequence in enumerate(sequence_ids) if sequence == 1]
    if not inside or offsets[inside[0]][0] > first or offsets[inside[-1]][1] < last:
        return None
    start = max(k for k in inside if offsets[k][0] <= first)
    return start, max(start, min(k for k in inside if offsets[k][1] >= last))


class QuestionAnswering:
    """Answers a data set's questions with a model, and scores the answers.

    Calling it with a model gives :func:`hf_reram.tasks.metrics.squad_v2.squad_v2_metrics`, so it fits
    :func:`hf_reram.evaluate_robustness`. Abstaining and answering compare the same window's scores: the question
    counts as unanswerable if ``score(first token) - score(best span)`` is above ``null_threshold``.

    Args:
        dataset: see the module. tokenizer: a fast one.
        max_length, stride: tokens of a window, and by how many neighbours overlap.
        n_best: candidates for start and for end in each window. max_answer_length: in tokens.
        null_threshold: in units of the scores. batch_size: windows a forward.

    Raises:
        ValueError: as :func:`check_squad`, or a tokenizer without character offsets.
    """

    def __init__(
        self,
        dataset,
        tokenizer,
        max_length: int = 384,
        stride: int = 128,
        n_best: int = 20,
        max_answer_length: int = 30,
        null_threshold: float = 0.0,
        batch_size: int = 32,
    ):
        check_squad(dataset, "the evaluation data")
        self.references = [{"id": row["id"], "answers": row["answers"]} for row in dataset]
        self.contexts = list(dataset["context"])
        if len({r["id"] for r in self.references}) < len(self.references):
            raise ValueError("the evaluation data hold an id twice: allowed are unique ids")
        self.n_best, self.max_answer_length, self.null_threshold = n_best, max_answer_length, null_threshold
        encoded = windows(tokenizer, dataset[:], max_length, stride)
        self.owners = encoded.pop("overflow_to_sample_mapping")
        self.offsets = [np.array(o) for o in encoded.pop("offset_mapping")]
        self.inside = [np.array([s == 1 for s in encoded.sequence_ids(i)]) for i in range(len(self.owners))]
        self.batches = batches_by_length(encoded, tokenizer, batch_size, padding_side="right")

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The official figures, in percent."""
        return self.score(self.predict(model))

    def predict(self, model: nn.Module) -> list[dict[str, Any]]:
        """For each question its id, ``prediction_text`` ("" abstains), ``no_answer_probability`` (a sigmoid of the
        score difference; 0.5 at a difference of 0), and ``n_best``, the best spans with their scores.

        Raises:
            ValueError: the model gives no start and end logits.
        """
        spans: dict[int, list] = defaultdict(list)
        nulls: dict[int, float] = {}
        with evaluating(model):
            device = next(model.parameters()).device
            for part, batch in self.batches:
                with torch.inference_mode():
                    output = model(**{key: value.to(device) for key, value in batch.items()})
                if getattr(output, "start_logits", None) is None or getattr(output, "end_logits", None) is None:
                    raise ValueError(f"{type(model).__name__} gives no start_logits and end_logits: it is not for QA")
                starts, ends = (z.float().cpu().numpy() for z in (output.start_logits, output.end_logits))
                for row, window in enumerate(part):
                    owner = self.owners[window]
                    null = float(starts[row, 0] + ends[row, 0])
                    nulls[owner] = min(nulls.get(owner, np.inf), null)
                    spans[owner] += self._best_spans(window, starts[row], ends[row])
        return [self._answer(i, spans[i], nulls[i]) for i in range(len(self.references))]

    def _best_spans(self, window: int, starts: np.ndarray, ends: np.ndarray) -> list[tuple[float, int, int]]:
        """(score, first character, last character + 1) of the window's best spans inside the context."""
        offsets = self.offsets[window]
        found = best_spans(starts, ends, self.inside[window], self.n_best, self.max_answer_length)
        return [(score, int(offsets[first][0]), int(offsets[last][1])) for score, first, last in found]

    def _answer(self, index: int, spans: list[tuple[float, int, int]], null: float) -> dict[str, Any]:
        spans = sorted(spans, key=lambda span: -span[0])[: self.n_best]
        n_best = [{"text": self.contexts[index][a:b], "score": score} for score, a, b in spans]
        difference = null - (n_best[0]["score"] if n_best else -np.inf)
        abstain = difference > self.null_threshold
        return {
            "id": self.references[index]["id"],
            "prediction_text": "" if abstain or not n_best else n_best[0]["text"],
            "no_answer_probability": float(1 / (1 + np.exp(-np.clip(difference, -500, 500)))),
            "n_best": n_best,
        }

    def score(self, predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The official figures of predictions; ``best_exact`` and ``best_f1`` search the threshold over each question's
        best span. ``HasAns_span_f1`` is the F1 of answerable questions if the model may not abstain."""
        result = squad_v2_metrics(predictions, self.references)
        spans = [{**p, "prediction_text": p["n_best"][0]["text"] if p["n_best"] else ""} for p in predictions]
        free = squad_v2_metrics(spans, self.references)
        for key in ("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"):
            result[key] = free[key]
        if "HasAns_f1" in free:
            result["HasAns_span_f1"] = free["HasAns_f1"]
        return result
