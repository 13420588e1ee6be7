"""``pipeline("question-answering")``, which transformers 5 has no longer.

It is registered when :mod:`hf_reram.tasks` is imported, or by :func:`register`.
"""

import importlib
from typing import Any

import numpy as np
from transformers import AutoModelForQuestionAnswering
from transformers.pipelines.base import ChunkPipeline

from .register import wants_pipelines
from .spans import best_spans, windows

TASK = "question-answering"


# Pipeline declares its class attributes as None and its hooks with other arguments than its own subclasses take.
Base: Any = ChunkPipeline


class QuestionAnsweringPipeline(Base):
    """Answers from contexts with any ``AutoModelForQuestionAnswering``, as the pipeline of transformers 4 did.

    Call it with ``question=`` and ``context=``, two strings or two lists of the same length, or with a dict or a list
    of dicts of both. Options of the call or of ``pipeline()``: ``top_k`` (1), ``doc_stride`` (128, tokens),
    ``max_seq_len`` (384, tokens of a window), ``max_answer_len`` (30, tokens), ``handle_impossible_answer`` (False;
    True allows the empty answer), and ``batch_size``.

    Returns:
        A dict of ``score`` (probability of the start times that of the end, in its window), ``start`` and ``end``
        (characters of the context) and ``answer``; a list of ``top_k`` of them if that is above 1, and a list of the
        results for several questions.

    Raises:
        ValueError: question or context is missing, empty or no string, lists of different lengths, ``top_k`` below 1,
            or a tokenizer without character offsets.
    """

    default_input_names = "question,context"
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_answer_len: int | None = None,
        handle_impossible_answer: bool | None = None,
    ):
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: allowed is a whole number >= 1")
        given = {"top_k": top_k, "max_answer_len": max_answer_len, "handle_impossible_answer": handle_impossible_answer}
        split = {"doc_stride": doc_stride, "max_seq_len": max_seq_len}
        return _set(split), {}, _set(given)

    def __call__(self, *args, question=None, context=None, **kwargs) -> Any:
        inputs = args[0] if args else {"question": question, "context": context}
        if len(args) == 2:  # pipe(question, context), by position
            inputs = {"question": args[0], "context": args[1]}
        return super().__call__(_examples(inputs), **kwargs)

    def preprocess(self, example: dict[str, str], doc_stride: int = 128, max_seq_len: int = 384):
        for key in ("question", "context"):
            text = example.get(key)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{key}={text!r}: allowed is a string that is not empty")
        rows = {key: [example[key]] for key in ("question", "context")}
        longest = min(max_seq_len, self.tokenizer.model_max_length)
        encoded = windows(self.tokenizer, rows, longest, min(doc_stride, longest // 2))
        known = [name for name in self.tokenizer.model_input_names if name in encoded]
        for i, offsets in enumerate(encoded["offset_mapping"]):
            tensors = self.tokenizer.pad({name: [encoded[name][i]] for name in known}, return_tensors="pt")
            yield {
                **tensors,
                "inside": [sequence == 1 for sequence in encoded.sequence_ids(i)],
                "offsets": offsets,
                "context": example["context"],
                "is_last": i == len(encoded["offset_mapping"]) - 1,
            }

    def _forward(self, window: dict[str, Any]) -> dict[str, Any]:
        names = self.tokenizer.model_input_names
        output = self.model(**{name: window[name] for name in names if name in window})
        kept = {key: value for key, value in window.items() if key not in names or key == "attention_mask"}
        return {**kept, "starts": output.start_logits, "ends": output.end_logits}

    def postprocess(
        self, outputs, top_k: int = 1, max_answer_len: int = 30, handle_impossible_answer: bool = False
    ) -> dict[str, Any] | list[dict[str, Any]]:
        found: dict[tuple[int, int], float] = {}
        null = np.inf
        context = outputs[0]["context"]
        for window in outputs:
            # Padding, on whichever side, is no token of the window.
            tokens = window["attention_mask"][0].bool().cpu().numpy()
            inside, offsets = np.array(window["inside"]), window["offsets"]
            possible = inside | (np.arange(len(inside)) == 0)  # the first token stands for "no answer"
            starts, ends = (
                _log_softmax(window[key][0].float().cpu().numpy()[tokens], possible) for key in ("starts", "ends")
            )
            null = min(null, float(starts[0] + ends[0]))
            for score, first, last in best_spans(starts, ends, inside, max(20, top_k), max_answer_len):
                span = offsets[first][0], offsets[last][1]
                found[span] = max(score, found.get(span, -np.inf))
        if handle_impossible_answer:
            found[0, 0] = null
        best = sorted(found, key=lambda span: -found[span])[:top_k]
        answers = [
            {"score": float(np.exp(found[a, b])), "start": int(a), "end": int(b), "answer": context[a:b]}
            for a, b in best
        ]
        if not answers:
            raise ValueError("the context holds no token that could be an answer")
        return answers[0] if top_k == 1 else answers


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _examples(inputs: Any) -> Any:
    """A dict of one question, or a list of such."""
    if not isinstance(inputs, dict):
        return inputs
    if not {"question", "context"} <= inputs.keys():
        raise ValueError(f"{sorted(inputs)}: allowed are a question and a context")
    question, context = inputs["question"], inputs["context"]
    if isinstance(question, str) and isinstance(context, str):
        return inputs
    if isinstance(question, list) and isinstance(context, str):
        context = [context] * len(question)
    if not (isinstance(question, list) and isinstance(context, list) and len(question) == len(context)):
        raise ValueError(f"question={question!r}, context={context!r}: allowed are strings, or lists of one length")
    return [{"question": q, "context": c} for q, c in zip(question, context, strict=True)]


def _log_softmax(scores: np.ndarray, possible: np.ndarray) -> np.ndarray:
    scores = np.where(possible, scores, -np.inf)
    scores = scores - scores[possible].max()
    return scores - np.log(np.exp(scores).sum())


def register() -> None:
    """Make the task known to transformers' ``pipeline``, unless it is.

    transformers 5 refuses the tasks that it has given up before it looks at what is registered. Its list of them stays
    as it is; the function that reads the list lets this one task pass.
    """
    # Not a name imported above: transformers may have reloaded its module.
    pipelines: Any = importlib.import_module("transformers.pipelines")
    registry = pipelines.PIPELINE_REGISTRY
    if TASK in registry.get_supported_tasks():
        return
    registry.register_pipeline(TASK, QuestionAnsweringPipeline, AutoModelForQuestionAnswering, type="text")
    refuse = pipelines._resolve_deprecated_task
    pipelines._resolve_deprecated_task = lambda task: task if task == TASK else refuse(task)


if wants_pipelines():
    register()
