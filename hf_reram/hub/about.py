"""What is known about a robust model beside its numbers."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers

from ..device.checks import shown
from ..evaluation.fields import COUNT, FLAG, NAMED_TEXTS, NUMBER, NUMBERS, TEXT, TEXTS, fields_of, optional
from ..evaluation.report import RobustnessReport
from ..model.adapters import has_adapters
from ..model.find import unwrapped
from ..version import __version__

NEEDED = dict.fromkeys(("task", "metric", "dataset", "base_model", "name"), TEXT)
OTHERS = {
    "dataset_split": TEXT,
    "relation": TEXT,
    "repo": optional(TEXT),
    "examples": optional(COUNT),
    "base_metrics": NUMBERS,
    "control_metrics": NUMBERS,
    "details": TEXTS,
    "label_free": FLAG,
    "command": optional(TEXT),
    "training": TEXTS,
    "co2_grams": optional(NUMBER),
    "versions": NAMED_TEXTS,
    "date": TEXT,
}

# By the Hub's pipeline tags.
AUTO_CLASSES = {
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}


@dataclass
class About:
    """What a card says beside numbers; kept in :attr:`RobustnessReport.about`.

    Attributes:
        task: the Hub's pipeline tag, "" where none fits. metric: the one to judge by, "" where none was measured.
        dataset: Hub id or name of the evaluated data, dataset_split: of them.
        base_model: Hub id, or the name of a local model. relation: the Hub's word for what was made of it.
        name: of the robust model. repo: where it is, None: ``name``.
        examples: how many were evaluated.
        base_metrics: of the digital base. control_metrics: of the base finetuned digitally, at the same budget.
        details: the metrics of the second table; empty: all.
        label_free: whether it was trained on the base's predictions alone.
        command: that made it. training: what else to say about the training, a sentence each.
        co2_grams: that the training emitted, where known.
        versions: by package. date: ISO.
    """

    task: str
    metric: str
    dataset: str
    base_model: str
    name: str
    dataset_split: str = "validation"
    relation: str = "finetune"
    repo: str | None = None
    examples: int | None = None
    base_metrics: dict[str, float] = field(default_factory=dict)
    control_metrics: dict[str, float] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    label_free: bool = False
    command: str | None = None
    training: list[str] = field(default_factory=list)
    co2_grams: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def digital(self) -> dict[str, dict[str, float]]:
        """The metrics of what there is of digital models, by what a table calls them."""
        return digital_rows(self.base_metrics, self.control_metrics)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "About":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing or unknown, or values of another kind.
        """
        known = {*NEEDED, *OTHERS}
        if isinstance(values, Mapping) and (unknown := sorted(map(str, values.keys() - known))):
            raise ValueError(f"a report's 'about' has unknown fields {shown(unknown)}: allowed are {sorted(known)}")
        try:
            return cls(**fields_of(values, NEEDED, OTHERS))
        except ValueError as error:
            raise ValueError(f"a report's 'about': {error}") from None


def digital_rows(base: Mapping[str, float], control: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of a digital base and of its control, by what a table calls them; without those that are empty."""
    return {label: dict(found) for label, found in (("digital base", base), ("digital, finetuned", control)) if found}


def about_model(model: Any, report: RobustnessReport | None, repo: str | None = None, **known: Any) -> About:
    """What a model and its report say for the card by themselves; ``known`` comes first."""
    base = getattr(model, "name_or_path", "") or ""
    folder = Path(base) if base else None
    local = folder is None or folder.exists()
    name = (repo or (folder.resolve().name if folder else "") or type(model).__name__).rpartition("/")[2]
    scored = [metric for metric in report.metrics if metric != "loss"] or report.metrics if report else [""]
    found = {
        "task": task_of(model),
        "metric": scored[0],
        "dataset": "",
        "dataset_split": "",
        "base_model": base if not local else folder.resolve().name if folder else type(model).__name__,
        "name": name,
        "relation": "adapter" if has_adapters(model) else "finetune",
        "repo": repo,
        "versions": {"hf_reram": __version__, "transformers": transformers.__version__},
    }
    return About(**{**found, **{key: value for key, value in known.items() if value is not None}})


def task_of(model: Any) -> str:
    """The Hub's pipeline tag of a model's class, "" where none fits."""
    from transformers.models.auto import modeling_auto

    model = unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = {cls.__name__ for cls in type(model).__mro__}
    for task, auto in AUTO_CLASSES.items():
        # AutoModelForSpeechSeq2Seq: MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z])(?=[0-9])", "_", auto.removeprefix("AutoModelFor")).upper()
        found = getattr(modeling_auto, f"MODEL_FOR_{words}_MAPPING_NAMES").get(kind, ())
        if names & ({found} if isinstance(found, str) else set(found)):
            return task
    return ""
