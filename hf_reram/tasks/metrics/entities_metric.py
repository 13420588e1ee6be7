"""Entity-level figures in the form of the evaluate library."""

import datasets
import evaluate

from .entities import entity_metrics


class EntityF1(evaluate.Metric):
    """The figures as an ``evaluate.Metric``: ``EntityF1().compute(predictions=..., references=...)``; arguments and
    results as for :func:`entity_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Entity-level precision, recall and F1, and the accuracy of tags.",
            citation="Tjong Kim Sang, De Meulder: Introduction to the CoNLL-2003 Shared Task",
            inputs_description=entity_metrics.__doc__ or "",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return entity_metrics(predictions, references)
