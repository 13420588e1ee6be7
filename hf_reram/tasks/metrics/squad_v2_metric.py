"""SQuAD v2's metrics in the form of the evaluate library."""

import datasets
import evaluate

from .squad_v2 import squad_v2_metrics


class SquadV2(evaluate.Metric):
    """The metrics as an ``evaluate.Metric``: ``SquadV2().compute(predictions=..., references=...)``; arguments and
    results as for :func:`squad_v2_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": {
                    "id": datasets.Value("string"),
                    "prediction_text": datasets.Value("string"),
                    "no_answer_probability": datasets.Value("float32"),
                },
                "references": {
                    "id": datasets.Value("string"),
                    "answers": {
                        "text": datasets.List(datasets.Value("string")),
                        "answer_start": datasets.List(datasets.Value("int32")),
                    },
                },
            }
        )
        return evaluate.MetricInfo(
            description="SQuAD v2: exact match, F1 and AvNA, in all, with and without answer.",
            citation="Rajpurkar, Jia, Liang: Know What You Don't Know, arXiv 1806.03822",
            inputs_description=squad_v2_metrics.__doc__ or "",
            features=features,
        )

    def _compute(self, predictions, references, no_answer_threshold: float = 1.0) -> dict[str, float]:
        return squad_v2_metrics(predictions, references, no_answer_threshold)
