"""Causal language models: texts as packed windows of tokens, and their perplexity."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ..model.inputs import evaluating
from .data import Batches

logger = logging.get_logger(__name__)

TEXTS = ("text", "content", "context", "document")
CHATS = ("messages", "conversations")
LENGTH = 1024  # tokens of a window, unless the model takes fewer


def find_text_column(dataset: Any, what: str = "dataset") -> str:
    """Name of the text column: the first of :data:`TEXTS` that there is.

    Raises:
        ValueError: there is none.
    """
    found = next((name for name in TEXTS if name in dataset.column_names), None)
    if found is None:
        raise ValueError(f"{what} has columns {dataset.column_names}: missing is a text column, one of {list(TEXTS)}")
    return found


def texts_of(dataset: Any, what: str = "dataset") -> list[Any]:
    """The data set's conversations, lists of messages with ``role`` and ``content``, where it has a column of
    :data:`CHATS`; else its texts, each once: SQuAD repeats a paragraph for each question. Empty ones stay, to be
    counted.

    Raises:
        ValueError: there is no text column, or what stands there is no text.
    """
    if chats := next((name for name in CHATS if name in dataset.column_names), None):
        return [messages or [] for messages in dataset[chats][:]]
    column = dataset[find_text_column(dataset, what)][:]
    if wrong := next((value for value in column if not isinstance(value, str) and value is not None), None):
        raise ValueError(f"{what} has {type(wrong).__name__} where texts should be: allowed are strings")
    found = {text if text and text.strip() else (i,): text or "" for i, text in enumerate(column)}
    return list(found.values())


def window_length(model: Any, length: int | None = None) -> int:
    """Tokens of a window: ``length``, or :data:`LENGTH` where that is None and the model takes as many.

    Raises:
        ValueError: the model takes fewer, or it is below 2.
    """
    most = getattr(_text_config(model), "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else None
    if length is None:
        return min(LENGTH, most or LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2 or (most and length > most):
        raise ValueError(f"length={length!r}: allowed is an integer from 2 to {most or 'what the model takes'}")
    return length


def _text_config(model: Any) -> Any:
    """A model's config, or that of its decoder of texts; None where it has none."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return of_text(decoder=True) if callable(of_text) else config


def packed(texts: Iterable[Any], tokenizer: Any, length: int, what: str = "the data") -> list[Tensor]:
    """Texts one after the other, each ended by the tokenizer's end-of-text token, cut into windows of ``length``
    tokens; the last one may be shorter, if it holds at least two. Empty texts are left out and counted in a warning.

    Args:
        texts: strings; or conversations, which the tokenizer's chat template writes out, see :func:`texts_of`.
        length: in tokens. what: for messages.

    Raises:
        ValueError: no text is left; conversations for a tokenizer without a chat template, or not of messages.
    """
    ids: list[int] = []
    texts = list(texts)
    kept = [text for text in texts if (text.strip() if isinstance(text, str) else text)]
    if len(kept) < len(texts):
        logger.warning("%s: %d of %d texts are empty and left out", what, len(texts) - len(kept), len(texts))
    for start in range(0, len(kept), 256):
        for found in _tokens(kept[start : start + 256], tokenizer, what):
            ids += found
    windows = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError(f"{what}: no text is left of {len(texts)}: allowed is at least one of two tokens")
    return windows


def _tokens(texts: list[Any], tokenizer: Any, what: str) -> list[list[int]]:
    if isinstance(texts[0], str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = tokenizer(texts, verbose=False).input_ids
        return [found if found[-len(end) :] == end else [*found, *end] for found in ids]  # which some add themselves
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{what} holds conversations, and the tokenizer has no chat template: allowed are texts")
    for messages in texts:
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError(f"{what} holds {messages!r:.80}: allowed are messages with 'role' and 'content'")
    return [tokenizer.apply_chat_template(messages, return_dict=False) for messages in texts]


class Perplexity:
    """How well a causal model predicts texts: calling it with a model gives ``perplexity`` and its logarithm,
    ``loss`` in nats a token, so it fits :func:`hf_reram.evaluate_robustness`.

    Each window is predicted by itself, its first token is given.

    Args:
        windows: of token ids, see :func:`packed`. batch_size: windows a forward.

    Raises:
        ValueError: there is no window.
    """

    def __init__(self, windows: Sequence[Tensor], batch_size: int = 8):
        if not len(windows):
            raise ValueError("perplexity of no windows: allowed is at least one")
        by_length: dict[int, list[Tensor]] = {}
        for window in windows:
            by_length.setdefault(len(window), []).append(window)
        parts = (
            same[start : start + batch_size] for same in by_length.values() for start in range(0, len(same), batch_size)
        )
        self.batches = Batches(({"input_ids": torch.stack(part)} for part in parts), list(windows))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """
        Raises:
            ValueError: the model gives no logits over its vocabulary, or takes fewer tokens than a window has, or knows
                fewer than the tokenizer.
        """
        window_length(model, max(batch["input_ids"].shape[1] for batch in self.batches))
        largest = max(int(batch["input_ids"].max()) for batch in self.batches)
        known = getattr(_text_config(model), "vocab_size", None)
        if known is not None and largest >= known:
            raise ValueError(f"the windows have token {largest}: allowed are the model's, 0 to {known - 1}")
        total, tokens = 0.0, 0
        with evaluating(model):
            device = next(model.parameters()).device
            for batch in self.batches:
                ids = batch["input_ids"].to(device)
                with torch.inference_mode():
                    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
                if logits is None or logits.shape[:2] != ids.shape:
                    raise ValueError(f"{type(model).__name__} gives no logits of each token: it is no causal model")
                for row, wanted in zip(logits, ids):  # one by one: in float32 a vocabulary is large
                    total += float(F.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum"))
                    tokens += len(wanted) - 1
        loss = total / tokens
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
