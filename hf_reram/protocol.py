"""The comparison that every recipe makes: one digital base, several ways to put it on crossbars, the same budget, data
and chips for each (DESIGN §5)."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .config import ReRAMConfig
from .device.time import format_time
from .evaluation import evaluate_robustness
from .report import RobustnessReport, write_whole
from .trainer import ReRAMTrainer
from .version import __version__

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Method:
    """One way to put the base on crossbars.

    Attributes:
        label: in table and plot. loss: ``retention_loss``; "" takes the config's, None trains nothing.
        mapped: shrink and clipping as the config says, else a naive crossbar: the whole read voltage, no clipping.
    """

    label: str
    loss: str | None
    mapped: bool = True

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")

    def config(self, config: ReRAMConfig) -> ReRAMConfig:
        """``config`` changed to this method."""
        changes: dict[str, Any] = {} if self.mapped else {"range_shrink": 1.0, "weight_clip": None}
        if self.loss != "":
            changes["retention_loss"] = self.loss or "none"
        return ReRAMConfig.from_dict({**config.to_dict(), **changes})


OURS = Method("hf_reram", "")
METHODS = (
    Method("naive crossbar", None, mapped=False),
    Method("calibrated mapping, no finetuning", None),
    Method("finetuned without retention loss", "none"),
    Method("finetuned with noise injection", "noise"),
    OURS,
)


def run_protocol(
    make_trainer: Callable[[ReRAMConfig, str], ReRAMTrainer],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    config: ReRAMConfig,
    folder: str | Path,
    times: Sequence[str | float],
    seeds: int | Iterable[int] = 10,
    methods: Sequence[Method] = METHODS,
    metric: str | None = None,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
    temperatures: Sequence[float | None] = (None,),
    command: str | None = None,
) -> dict[str, RobustnessReport]:
    """Train and evaluate every method, and compare them in ``folder``: ``report.md``, ``report.json``,
    ``robustness.png``, and for each method a folder with its checkpoints, model and report.

    What a killed run has finished is not done again: methods, training steps up to the last checkpoint (as
    ``TrainingArguments.save_strategy`` says), chips. With several processes each evaluates its share of the chips, and
    the first one writes.

    Args:
        make_trainer: called with a method's config and output folder; returns a trainer with a fresh copy of the base.
        evaluate: see :func:`hf_reram.evaluate_robustness`; must not talk to other processes.
        config: that of :data:`OURS`.
        metric: of table and plot; None takes the first. title: of the plot.
        settings: what else the results depend on, such as hyperparameters.
        command: what was run, for the report.

    Returns:
        Reports by the methods' labels.

    Raises:
        ValueError: ``folder`` holds a comparison with another config or other settings.
    """
    folder, reports = Path(folder), {}
    _claim(folder, {"config": config.to_dict(), "settings": dict(settings or {})})
    main = True
    for method in methods:
        home = folder / method.folder
        trainer = make_trainer(method.config(config), str(home))
        main = trainer.is_world_process_zero()
        if method.loss is not None:
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(home)) if home.is_dir() else None)
            if hasattr(trainer.model, "merge_and_unload"):  # LoRA: a chip has no digital side path
                trainer.model = trainer.model.merge_and_unload()
        logger.warning("evaluating: %s", method.label)
        report = evaluate_robustness(
            trainer.model,
            evaluate,
            times,
            temperatures,
            seeds,
            progress=main,
            resume=home / "chips.jsonl",
            share_chips=True,
        )
        reports[method.label] = report
        if main:
            report.to_json(home / "robustness.json")
        if method.loss is not None:
            trainer.save_model(str(home / "model"))
            if main:
                report.to_json(home / "model" / "robustness.json")
    if main:
        write_comparison(folder, reports, metric, title, command)
    return reports


def write_comparison(
    folder: str | Path,
    reports: Mapping[str, RobustnessReport],
    metric: str | None = None,
    title: str | None = None,
    command: str | None = None,
) -> None:
    """``report.md``, ``report.json`` and ``robustness.png`` of several models' reports."""
    folder, (first, *others) = Path(folder), list(reports.values())
    metric = metric or first.metrics[0]
    last = first.times[-1]
    first.plot(folder / "robustness.png", *others, metric=metric, labels=list(reports), title=title)
    chips = first.statistic(metric, last).chips
    parts = [f"{metric}, mean ± standard deviation over {chips} chips:", comparison_table(reports, metric)]
    if len(first.metrics) > 1:
        parts += [f"Every metric after {format_time(last)}:", metrics_table(reports, last)]
    parts += ["\n".join(f"- {note}" for note in first.notes)] if first.notes else []
    if command:
        versions = f"hf_reram {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        parts += [f"Measured on {date.today()} with {versions}:", f"```bash\n{command}\n```"]
    write_whole(folder / "report.md", "\n\n".join(part.strip() for part in parts) + "\n")
    text = json.dumps({label: report.to_dict() for label, report in reports.items()}, indent=2)
    write_whole(folder / "report.json", text + "\n")


def metrics_table(reports: Mapping[str, RobustnessReport], time: str | float, decimals: int = 1) -> str:
    """Markdown: a row a metric, a column a model, mean over chips at one time."""
    first = next(iter(reports.values()))
    lines = [
        ["", *(["digital"] if first.digital else []), *reports],
        ["---"] * (len(reports) + 1 + bool(first.digital)),
    ]
    for metric in first.metrics:
        base = [first.digital[metric]] if first.digital else []
        means = [report.statistic(metric, time).mean for report in reports.values()]
        lines.append([metric, *(f"{value:.{decimals}f}" for value in [*base, *means])])
    return _markdown(lines)


def comparison_table(reports: Mapping[str, RobustnessReport], metric: str | None = None, decimals: int = 1) -> str:
    """Markdown: the digital base and a row a model; ideal crossbar and mean ± standard deviation over chips at each
    time."""
    first = next(iter(reports.values()))
    metric = metric or first.metrics[0]
    lines = [["", "ideal crossbar", *(format_time(t) for t in first.times)], ["---"] * (len(first.times) + 2)]
    if first.digital:
        lines.append(["digital", "–", *[f"{first.digital[metric]:.{decimals}f}"] * len(first.times)])
    for label, report in reports.items():
        cells = [report.statistic(metric, t) for t in report.times]
        ideal = f"{report.ideal[metric]:.{decimals}f}" if report.ideal else "–"
        lines.append([label, ideal, *(f"{s.mean:.{decimals}f} ± {s.std:.{decimals}f}" for s in cells)])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _claim(folder: Path, what: dict[str, Any]) -> None:
    """Note in the folder what is compared there, or check that it is the same as before."""
    file, text = folder / "protocol.json", json.dumps(what, indent=2, default=str) + "\n"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(text)
        changed = sorted(
            f"{part}.{key}"
            for part in now
            for key in now[part].keys() | before.get(part, {}).keys()
            if now[part].get(key) != before.get(part, {}).get(key)
        )
        if changed:
            raise ValueError(
                f"{folder} holds a comparison with other values of {changed}: allowed are the same ones, which "
                "resumes it, or another folder"
            )
    else:
        write_whole(file, text)
