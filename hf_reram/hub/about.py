"""What is known about a robust model beside its numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class About:
    """What a card says beside numbers; kept in :attr:`RobustnessReport.about`.

    Attributes:
        task: the Hub's pipeline tag, "" where none fits. metric: the one to judge by, "" where none was measured.
        dataset: Hub id or name of the evaluated data, dataset_split: of them.
        base_model: Hub id, or the name of a local model. relation: the Hub's word for what was made of it.
        name: of the robust model. repo: where it is, None: ``name``.
        examples: how many were evaluated.
        base_metrics: of the digital base. details: the metrics of the second table; empty: all.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "About":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"a report's 'about' has the fields {sorted(values)}: {error}") from None
