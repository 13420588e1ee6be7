"""A folder of task files for lm-evaluation-harness, on data beside them."""

import json
from pathlib import Path
from typing import Any

CHOICES = [
    {"question": "the cell", "choices": ["drifts", "holds a weight", "for years"], "answer": 0},
    {"question": "a weight", "choices": ["and", "holds .", "for years ."], "answer": 1},
    {"question": "the weight drifts", "choices": ["and the cell holds", "holds", "."], "answer": 2},
    {"question": "the cell holds", "choices": ["a weight", "the", "years"], "answer": 0},
    {"question": "years and years", "choices": ["drifts", ".", "the cell"], "answer": 1},
    {"question": "a cell", "choices": ["the", "for a", "holds"], "answer": 2},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: {kind}
{more}
metadata: {{version: 1.0}}
"""
METRIC = "{{metric: {}, aggregation: {}, higher_is_better: {}}}"


def metrics(*names: str) -> str:
    means = {"word_perplexity": "weighted_perplexity"}
    found = [METRIC.format(name, means.get(name, "mean"), str(name not in means).lower()) for name in names]
    return f"metric_list: [{', '.join(found)}]"


def write_task(folder: Path, name: str, kind: str, more: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, more=more))


def write_choice(folder: Path, rows: list[dict[str, Any]] = CHOICES, more: str = "") -> Path:
    texts = 'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: choices\n'
    write_task(folder, "tiny_choice", "multiple_choice", texts + metrics("acc", "acc_norm") + "\n" + more, rows)
    return folder


def write_rolling(folder: Path, texts: list[str]) -> Path:
    fields = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    write_task(
        folder, "tiny_text", "loglikelihood_rolling", fields + metrics("word_perplexity"), [{"text": t} for t in texts]
    )
    return folder


def write_answers(folder: Path, questions: list[str], answers: list[str]) -> Path:
    fields = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    fields += "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers)]
    write_task(folder, "tiny_answer", "generate_until", fields + metrics("exact_match"), rows)
    return folder
