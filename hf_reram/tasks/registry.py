"""The tasks that any checkpoint can be evaluated on: its data, its metrics and what it is calibrated with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import ReRAMConfig
from ..device.checks import shown
from ..evaluation.content import part_of
from ..hub.about import task_of
from .data import KINDS, draw, load_rows, load_tokenizer
from .harness import LMEval
from .image_classification import ImageClassification, check_labels, image_transforms
from .language_modeling import Perplexity, packed, texts_of, window_length
from .metrics.entities import are_entity_tags
from .question_answering import QuestionAnswering
from .text_classification import TextClassification
from .token_classification import TokenClassification


@dataclass
class Task:
    """A model's task on a data set.

    Attributes:
        evaluate: see :func:`hf_reram.evaluate_robustness`. batches: of model inputs, without labels, for calibration.
        metric: the one to judge by, "" where ``evaluate`` tells it of those that there are.
        examples: how many are evaluated.
        content: a fingerprint of them, and of what tokenizer or image processor make of them.
    """

    evaluate: Callable[[nn.Module], Mapping[str, float]]
    batches: list[Mapping[str, Any]]
    metric: str
    examples: int
    content: str = ""


def question_answering(model: Any, name: str, dataset: Any, batch_size: int = 32) -> Task:
    """SQuAD-like questions, unanswerable ones included.

    Raises:
        ValueError: the data are not SQuAD-like.
    """
    evaluate = QuestionAnswering(dataset, load_tokenizer(name), batch_size=batch_size)
    batches = [batch for _, batch in evaluate.batches]
    answerable = any(len(row["text"]) for row in dataset["answers"])
    return Task(evaluate, _spread(batches), "HasAns_span_f1" if answerable else "f1", len(dataset))


def image_classification(
    model: Any, name: str, dataset: Any, batch_size: int = 32, label_names: Mapping[str, str] | None = None
) -> Task:
    """Images and labels, numbers or names.

    Raises:
        ValueError: columns are missing, or labels are not the model's.
    """
    classes = check_labels(dataset, model, "the data set", label_names)
    _, plain = image_transforms(model, name)
    evaluate = ImageClassification(dataset, plain, batch_size, classes=classes)
    batches = [{"pixel_values": batch["pixel_values"]} for batch in evaluate.batches()]
    return Task(evaluate, _spread(batches), "accuracy", len(dataset))


def text_generation(model: Any, name: str, dataset: Any, batch_size: int = 32) -> Task:
    """Texts, packed into windows of tokens.

    Raises:
        ValueError: there is no text column or no text, the model has no tokenizer, or is no causal model.
    """
    windows = packed(texts_of(dataset), load_tokenizer(name), window_length(model), "the evaluation data")
    evaluate = Perplexity(windows, max(1, batch_size // 8))  # windows are long
    return Task(evaluate, _spread(evaluate.batches), "perplexity", len(windows))


def text_classification(
    model: Any, name: str, dataset: Any, batch_size: int = 32, label_names: Mapping[str, str] | None = None
) -> Task:
    """Texts or pairs of them, and labels, numbers or names; for a model with one output numbers.

    Raises:
        ValueError: columns are missing, labels are not the model's, or the model has no tokenizer.
    """
    tokenizer, classes = load_tokenizer(name), model.config.num_labels
    length = min(256, getattr(model.config, "max_position_embeddings", None) or 256)
    names = model.config.id2label
    evaluate = TextClassification(dataset, tokenizer, classes, length, batch_size, names, label_names)
    batches = [batch for _, batch in evaluate.batches]
    return Task(evaluate, _spread(batches), "accuracy" if classes > 1 else "pearson", len(dataset))


def token_classification(
    model: Any, name: str, dataset: Any, batch_size: int = 32, label_names: Mapping[str, str] | None = None
) -> Task:
    """Words and their tags.

    Raises:
        ValueError: columns are missing, tags are not the model's, or the model has no tokenizer.
    """
    # Tokenizers that take the space before a word into it have to be told that words have one.
    spaced = {"add_prefix_space": True} if model.config.model_type in ("bloom", "deberta", "gpt2", "roberta") else {}
    tokenizer = load_tokenizer(name, **spaced)
    length = min(512, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    evaluate = TokenClassification(dataset, tokenizer, model.config.id2label, length, batch_size, label_names)
    batches = [batch for _, batch in evaluate.batches]
    metric = "f1" if are_entity_tags(evaluate.names) else "accuracy"
    return Task(evaluate, _spread(batches), metric, len(dataset))


SPLIT = "validation"  # of a data set on the Hub

TASKS: dict[str, Callable[..., Task]] = {
    "question-answering": question_answering,
    "image-classification": image_classification,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "text-generation": text_generation,
}

# Those whose data have labels with names.
LABELED = ("image-classification", "text-classification", "token-classification")


def load_task(
    task: str,
    model: Any,
    name: str,
    dataset: str,
    split: str | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    label_names: Mapping[str, str] | None = None,
) -> Task:
    """A task with its data.

    Args:
        task: one of :data:`TASKS`. name: where the model came from.
        dataset: Hub id, parquet, JSON or text file, or folder of images by class.
        split: of a data set on the Hub; None: :data:`SPLIT`.
        samples: drawn by ``seed``; None: all.
        label_names: which of the model's names each of the data set's is, see
            :func:`hf_reram.tasks.labels.classes_of`; None: nothing is told.

    Raises:
        ValueError: another task, data that do not fit it, a split of a file or folder, or ``label_names`` of a task
            without labels. FileNotFoundError: no such file.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: allowed are {sorted(TASKS)}")
    if label_names and task not in LABELED:
        raise ValueError(f"label_names={shown(dict(label_names))} with task={task!r}: allowed are {sorted(LABELED)}")
    where = _where(dataset)
    if where and split is not None:
        raise ValueError(f"split={split!r} of {dataset}: allowed is one of a data set on the Hub")
    rows = draw(load_rows(dataset, split or SPLIT, **where), samples, seed)
    made = TASKS[task](model, name, rows, batch_size, **({"label_names": label_names} if label_names else {}))
    return replace(made, content=part_of("evaluation", made.evaluate))


def load_lm_eval(
    model: Any,
    name: str,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    samples: int | None = None,
    batch_size: int = 32,
) -> Task:
    """Tasks of lm-eval as one: its ``evaluate`` is a :class:`LMEval`, and it is calibrated with the tasks' prompts.

    Args:
        name: where the model came from. tasks, include_path, num_fewshot: see :class:`LMEval`.
        samples: the first so many questions of each task; None: all.

    Raises:
        ImportError: lm-eval is not installed. FileNotFoundError: no such task file or folder.
        ValueError: the model is no causal one or has no tokenizer, or lm-eval does not know a task.
    """
    if task_of(model) != "text-generation":
        raise ValueError(f"{name} is a {type(model).__name__}: lm-eval's tasks need a causal language model")
    tokenizer = load_tokenizer(name)
    evaluate = LMEval(tasks, tokenizer, num_fewshot, samples, include_path, batch_size)
    texts = Perplexity(packed(evaluate.texts, tokenizer, window_length(model), "the tasks"), max(1, batch_size // 8))
    return Task(evaluate, _spread(texts.batches), "", evaluate.examples, evaluate.content)


def _where(dataset: str) -> dict[str, str]:
    path = Path(dataset)
    if path.is_dir():
        return {"folder": dataset}
    return {"file": dataset} if path.suffix in KINDS or path.is_file() else {}


def _spread(batches: list) -> list:
    """As many as calibration reads, from all over: the first ones may be the shortest."""
    return batches[:: max(1, -(-len(batches) // ReRAMConfig.calibration_batches))]
