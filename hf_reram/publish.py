"""A checkpoint's folder made ready for the Hub: report, comparison, plot and card beside the weights."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import yaml_dump

from .about import About
from .card import BEGIN, END, model_card
from .report import RobustnessReport, write_whole


def write_card(path: str | Path, card: ModelCard) -> ModelCard:
    """Write a card so that what a person has written in the file there stays: the text outside the marks, and metadata
    that the new card does not set.

    Returns:
        What is in the file now.

    Raises:
        ValueError: the file there is a card whose marks are damaged.
    """
    path = Path(path)
    if path.exists() and (old := path.read_text(encoding="utf-8")).strip():
        card = _merged(ModelCard(old, ignore_metadata_errors=True), card, path)
    write_whole(path, str(card).strip() + "\n")
    return card


def _merged(old: ModelCard, new: ModelCard, path: Path) -> ModelCard:
    before, begin, rest = old.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if bool(begin) != bool(end):
        raise ValueError(f"{path} holds only one of the marks {BEGIN!r} and {END!r}: allowed are both or none")
    text = before + new.text.strip() + after if begin else f"{new.text.strip()}\n\n{old.text.strip()}\n"
    data = old.data.to_dict() | new.data.to_dict()
    for key in ("tags", "datasets", "metrics"):
        kept = [v for v in _listed(old.data.to_dict().get(key)) if v not in _listed(data.get(key))]
        if kept:
            data[key] = [*_listed(data.get(key)), *kept]
    return ModelCard(f"---\n{yaml_dump(data)}---\n{text}")


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def publish(
    folder: str | Path,
    report: RobustnessReport,
    comparison: Mapping[str, RobustnessReport] | None = None,
    title: str | None = None,
) -> None:
    """Put report, comparison, plot and card beside a checkpoint's weights: ``robustness.json``, ``comparison.json``,
    ``robustness.png`` and ``README.md``, ready for the Hub."""
    folder, about = Path(folder), About.from_dict(report.about)
    report.to_json(folder / "robustness.json")
    rows = dict(comparison or {})
    if rows:
        text = json.dumps({label: row.to_dict() for label, row in rows.items()})
        write_whole(folder / "comparison.json", text + "\n")
    reports = rows or {about.name: report}
    first, *others = reports.values()
    first.plot(
        folder / "robustness.png",
        *others,
        metric=about.metric,
        labels=list(reports),
        title=title,
        digital=about.base_metrics,
    )
    write_card(folder / "README.md", model_card(report, rows or None))


def read_comparison(path: str | Path) -> dict[str, RobustnessReport]:
    """What :func:`publish` wrote as ``comparison.json``: reports by label."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    return {label: RobustnessReport.from_dict(row, path) for label, row in data.items()}


def push(folder: str | Path, repo: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a checkpoint's folder, creating the repository if need be; the URL of the commit. Repeating it is safe."""
    api = HfApi(token=token)
    name = api.create_repo(repo, private=private, exist_ok=True).repo_id
    return str(
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["training_args.bin", "checkpoint-*"])
    )
