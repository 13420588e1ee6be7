"""Answers as spans of a context: its windows, and the best spans among a window's start and end scores."""

import numpy as np


def windows(tokenizer, rows: dict[str, list], max_length: int, stride: int):
    """Questions and contexts, split into windows of at most ``max_length`` tokens that overlap by ``stride``.

    Raises:
        ValueError: a stride that is not below the length, or a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: allowed is a fast tokenizer")
    if not 0 <= stride < max_length:
        raise ValueError(f"stride={stride!r}: allowed is an integer from 0 to max_length - 1 = {max_length - 1}")
    return tokenizer(
        [question.strip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def best_spans(
    starts: np.ndarray, ends: np.ndarray, inside: np.ndarray, n_best: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """The spans of the highest sums of a start's and an end's score, best first.

    Args:
        starts, ends: scores, one a token. inside: whether the token belongs to the context.
        n_best: how many spans, and how many starts and ends are looked at. max_answer_length: in tokens.

    Returns:
        (score, first token, last token) of each.
    """
    allowed = np.flatnonzero(inside)
    first = allowed[np.argsort(-starts[allowed], kind="stable")[:n_best]]
    last = allowed[np.argsort(-ends[allowed], kind="stable")[:n_best]]
    length = last[None, :] - first[:, None] + 1
    score = np.where((length > 0) & (length <= max_answer_length), starts[first][:, None] + ends[last], -np.inf)
    best = np.argsort(-score, axis=None, kind="stable")[:n_best]
    return [
        (float(score.flat[k]), int(first[k // len(last)]), int(last[k % len(last)]))
        for k in best
        if np.isfinite(score.flat[k])
    ]
