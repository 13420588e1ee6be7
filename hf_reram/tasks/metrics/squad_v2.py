"""SQuAD v2's metrics, as its official evaluation script defines them (Rajpurkar, Jia, Liang, arXiv 1806.03822).

``evaluate.load("squad_v2")`` fetches a script from the network; this one is a file of ours, with the same arguments
and results, and the share of questions where answering or abstaining was right (AvNA).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if the normalized answers are equal, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """F1 of the bags of normalized tokens, in [0, 1]; where one is empty, 1 if both are."""
    p, g = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not p or not g:
        return float(p == g)
    common = sum((Counter(p) & Counter(g)).values())
    return 2 * common / (len(p) + len(g))


def _best(score: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    # A gold answer of nothing but articles and punctuation does not count; none at all is "no answer".
    golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    return max(score(prediction, gold) for gold in golds)


def squad_v2_metrics(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """The official script's figures, in percent.

    Args:
        predictions: dicts of ``id``, ``prediction_text`` ("" abstains) and, optional, ``no_answer_probability``.
        references: dicts of ``id`` and ``answers``, ``{"text": [...]}``, without texts where there is no answer.
        no_answer_threshold: a prediction whose no_answer_probability is above it counts as abstaining.

    Returns:
        ``exact``, ``f1``, ``AvNA``, ``total``; the same of questions with (``HasAns_``) and without (``NoAns_``) an
        answer, where there are some; and ``best_exact``, ``best_f1`` with the thresholds that reach them.

    Raises:
        ValueError: predictions and references are not of the same questions, or there are none.
    """
    found = {p["id"]: p for p in predictions}
    wanted = {r["id"]: r for r in references}
    if not wanted or found.keys() != wanted.keys() or len(found) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: allowed is one prediction for each of "
            f"at least one question; {len(wanted.keys() - found.keys())} are missing, "
            f"{len(found.keys() - wanted.keys())} are of other questions"
        )
    rows = []
    for key, reference in wanted.items():
        text, golds = found[key]["prediction_text"], reference["answers"]["text"]
        null = float(found[key].get("no_answer_probability", 0.0))
        exact, f1 = _best(exact_match, text, golds), _best(token_f1, text, golds)
        has_answer = bool(golds)
        rows.append((has_answer, exact, f1, null, bool(text)))
    result: dict[str, float] = {}
    parts = {"": rows, "HasAns_": [r for r in rows if r[0]], "NoAns_": [r for r in rows if not r[0]]}
    for prefix, part in parts.items():
        if part:
            final = [_with_threshold(row, no_answer_threshold) for row in part]
            for i, name in enumerate(("exact", "f1", "AvNA")):
                result[prefix + name] = 100 * sum(scores[i] for scores in final) / len(part)
            result[prefix + "total"] = len(part)
    for i, name in ((1, "exact"), (2, "f1")):
        best, threshold = _best_threshold(rows, i)
        result[f"best_{name}"], result[f"best_{name}_thresh"] = best, threshold
    return result


def _with_threshold(row, threshold: float) -> tuple[float, float, float]:
    has_answer, exact, f1, null, answered = row
    if null > threshold:
        return (float(not has_answer),) * 3
    return exact, f1, float(answered == has_answer)


def _best_threshold(rows, score: int) -> tuple[float, float]:
    """Abstain on all, then answer one question more at a time, the surest first: the official search."""
    current = best = float(sum(not row[0] for row in rows))
    threshold = 0.0
    for row in sorted(rows, key=lambda row: row[3]):
        has_answer, answered = row[0], row[4]
        current += row[score] if has_answer else (-1.0 if answered else 0.0)
        if current > best:
            best, threshold = current, row[3]
    return 100 * best / len(rows), threshold
