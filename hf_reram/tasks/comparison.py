"""The comparison that every recipe makes: one digital base, several ways to put it on crossbars, the same budget, data
and chips for each."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.time import format_time
from ..evaluation.content import content_of, described, key_of
from ..evaluation.escape import code_block, escaped
from ..evaluation.files import write_whole
from ..evaluation.report import RobustnessReport
from ..evaluation.robustness import evaluate_robustness, key_text, numbers_of, refuse_untold
from ..evaluation.run_log import versions
from ..evaluation.tables import (
    comparison_cells,
    comparison_table,
    metrics_cells,
    metrics_table,
    over_chips,
    over_fewer,
    same_temperature,
)
from ..hub.about import About, digital_rows
from ..hub.publish import publish
from ..model.deploy import digital_eval
from ..model.digest import settings_of, weights_digest
from ..model.sharding import alike, is_first, of_first, processes
from ..training.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from ..integrations.trainer import ReRAMTrainer

logger = logging.get_logger(__name__)


PROTOCOL = "protocol.json"

# What a training leaves in its folder.
TRAINED = ("model", "checkpoint-*", "trained.txt")

# Of a model's settings, what a method changes.
CHANGING = ("attributes", "adapters")

NAIVE = {
    "range_shrink": 1.0,
    "weight_clip": None,
    "center_inputs": False,
    "equalize_inputs": False,
    "weight_scale": "per_channel",
    "redundancy": 0.0,
}


@dataclass(frozen=True)
class Method:
    """One way to put the base on crossbars.

    Attributes:
        label: in table and plot. loss: ``retention_loss``; "" takes the config's, None trains nothing.
        mapped: shrink, clipping, input offset, scales and redundancy as the config says, else a naive crossbar: the
            whole read voltage, the largest weight at g_max, inputs driven as they are.
        digital: trained off the crossbars, and no chip.
    """

    label: str
    loss: str | None
    mapped: bool = True
    digital: bool = False

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")

    def config(self, config: ReRAMConfig) -> ReRAMConfig:
        """``config`` changed to this method."""
        changes: dict[str, Any] = {} if self.mapped else dict(NAIVE)
        if self.loss != "":
            changes["retention_loss"] = self.loss or "none"
        return ReRAMConfig.from_dict({**config.to_dict(), **changes})


OURS = Method("hf_reram", "")
CONTROL = Method("digital, finetuned", "none", mapped=False, digital=True)
METHODS = (
    Method("naive crossbar", None, mapped=False),
    Method("calibrated mapping, no finetuning", None),
    CONTROL,
    Method("finetuned without retention loss", "none"),
    Method("finetuned with noise injection", "noise"),
    OURS,
)


def run_protocol(
    make_trainer: Callable[[ReRAMConfig, str], "ReRAMTrainer"],
    evaluate: Callable[[nn.Module], Mapping[str, float] | float],
    config: ReRAMConfig,
    folder: str | Path,
    times: Sequence[str | float],
    about: About,
    seeds: int | Iterable[int] = 10,
    methods: Sequence[Method] = METHODS,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
    temperatures: Sequence[float | None] = (None,),
    prepare: Callable[["ReRAMTrainer"], None] | None = None,
    key: Any = None,
    allow_uncalled: bool = False,
) -> dict[str, RobustnessReport]:
    """Train and evaluate every method, and compare them in ``folder``: ``report.md``, ``report.json``,
    ``robustness.png``, and for each method a folder with its checkpoints, model and report. A model's folder also holds
    its card, plot and comparison, ready to be pushed. :data:`CONTROL` trains the base digitally, with the same task
    loss, steps and data: what finetuning does without crossbars; a base that would follow itself, without labels, stays
    what it is and is not trained.

    What a killed run has finished is not done again: methods, training steps up to the last checkpoint (as
    ``TrainingArguments.save_strategy`` says), chips; figures of another version of hf_reram, torch or transformers are
    measured again. Times, chips, temperatures and methods may then be others or more.
    ``folder`` keeps what all else was, in ``protocol.json``: config, settings, and fingerprints of what is evaluated,
    of the base model's weights and config, and of the training data, where something tells those from others. With
    several processes each evaluates its share of the chips, and adds them to ``chips.jsonl``; all else the first one
    writes, and its fingerprints count for all.

    Args:
        make_trainer: called with a method's config and output folder; returns a trainer with a fresh copy of the base.
        evaluate: see :func:`hf_reram.evaluate_robustness`; must not talk to other processes.
        config: that of :data:`OURS`.
        about: what the card says; base metrics, training, versions and date are added.
        title: of the plot.
        settings: what else the results depend on, such as hyperparameters.
        prepare: called with each trainer before its training, after the base was measured.
        key: what ``evaluate`` depends on beside the model, any JSON value; None: a fingerprint of ``evaluate`` and its
            data, as :func:`hf_reram.evaluate_robustness` makes it, files that it names included.
        allow_uncalled: see :func:`hf_reram.evaluate_robustness`; ``report.md`` names the layers too.

    Returns:
        Reports by the methods' labels.

    Raises:
        ValueError: no method is on crossbars.
        ValueError: ``folder`` holds a comparison with another config, other settings, another evaluation, base model or
            training data, or an earlier hf_reram's, which did not keep them; names what differs. Or it holds models or
            checkpoints and no ``protocol.json``. Or nothing tells ``evaluate`` from another one and there is no
            ``key``, or this is no JSON value.
        RuntimeError: in the other processes, that one of them has failed.
    """
    folder, reports = Path(folder), {}
    if all(method.digital for method in methods):
        raise ValueError(f"methods={[m.label for m in methods]}: allowed is at least one that is on crossbars")
    with alike(processes() > 1, "the comparison"):
        keyed = key is not None
        content = {"evaluation": key} if keyed else key_of("evaluation", evaluate, log=folder / PROTOCOL)
        key_text(content)  # is an error now, not after a training
    content = of_first(content)  # of a function that holds its process's device, each has another
    what = {"config": config.to_dict(), "settings": dict(settings or {}), "content": content}
    _by_first(_refuse_others, folder, what)  # before the work that a trainer is
    about = replace(about, versions=versions(), date=str(date.today()))
    main = True
    crossbars = [method for method in methods if not method.digital]
    controls = [method for method in methods if method.digital and not about.label_free]
    for method in [*controls, *crossbars]:
        home = folder / method.folder
        trainer = make_trainer(method.config(config), str(home))
        main = trainer.is_world_process_zero()
        if "base" not in what["content"]:
            if not keyed:
                refuse_untold(settings_of(trainer.model))
            what["content"] = of_first({**what["content"], **_made_of(trainer)})
            key = what["content"]["evaluation"]  # the first one's, also where make_trainer has joined the processes
            _by_first(_claim, folder, what)
        if not about.base_metrics:
            of = described([what["content"]["base"], key, versions()])
            about.base_metrics = _digital_metrics(trainer, evaluate, folder / "base.json", of)
        if prepare is not None:
            prepare(trainer)
        if method.digital:
            train = partial(_train, trainer, home, trainer.train_digitally)
            of, file = described([what["content"], versions()]), home / "digital.json"
            about.control_metrics = _digital_metrics(trainer, evaluate, file, of, train)
            continue
        note = _train(trainer, home) if method.loss is not None else None
        logger.warning("evaluating: %s", method.label)
        report = evaluate_robustness(
            trainer.model,
            evaluate,
            times,
            temperatures,
            seeds,
            progress=main,
            resume=home / "chips.jsonl",
            key=key,
            share_chips=True,
            allow_uncalled=allow_uncalled,
        )
        report.about = replace(about, training=[*about.training, *([note] if note else [])]).to_dict()
        reports[method.label] = report
        if main:
            report.to_json(home / "robustness.json")
        if method.loss is not None:
            trainer.save_model(str(home / "model"))
    if main:
        write_comparison(folder, reports, about.metric, title)
        for method in crossbars:
            if method.loss is not None:
                publish(folder / method.folder / "model", reports[method.label], reports, title)
    return reports


def _made_of(trainer: "ReRAMTrainer") -> dict[str, Any]:
    """Fingerprints of the base model, which a trainer's fresh model still is, and of the data that it is trained on;
    None where nothing tells these from others. The first process's count."""
    every = settings_of(trainer.model)
    settings = {name: value for name, value in every.items() if name not in CHANGING}
    settings |= {name: value for name, value in every["attributes"].items() if name.startswith("generation_config.")}
    data = _content_of(trainer.train_dataset) if is_first() else None  # which may be long to read
    return {"base": described([weights_digest(trainer.model, base=True), settings]), "training data": data}


def _content_of(dataset: Any) -> str | None:
    try:
        return content_of(dataset)
    except ValueError as error:
        logger.warning("other training data would not be noticed when this is resumed: %s", error)
        return None


def _digital_metrics(
    trainer: "ReRAMTrainer", evaluate: Callable, file: Path, of: str, train: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Those of a trainer's model off its crossbars, measured once for the same ``of``, after ``train``."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if before.get("of") == of:
        return before["metrics"]
    if train is not None:
        train()
    with digital_eval(trainer.model):
        found = numbers_of(evaluate(trainer.model))
    if trainer.is_world_process_zero():
        write_whole(file, json.dumps({"of": of, "metrics": found}, indent=2) + "\n")
    return found


def _train(trainer: "ReRAMTrainer", home: Path, train: Callable[..., Any] | None = None) -> str:
    """Train from the last checkpoint on, if there is one; what to say about it, which a resumption says again.

    Args:
        train: the trainer's method to do it with; None: ``train``.
    """
    checkpoint = last_checkpoint(home)
    done = (train or trainer.train)(resume_from_checkpoint=checkpoint)
    model: Any = trainer.model
    if hasattr(model, "merge_and_unload"):  # LoRA: a chip has no digital side path
        trainer.model = model.merge_and_unload()
    steps, size = trainer.state.global_step, trainer.args.train_batch_size * trainer.args.world_size
    size *= trainer.args.gradient_accumulation_steps
    note, file = f"{steps} steps of {size} examples, learning rate {trainer.args.learning_rate:g}", home / "trained.txt"
    if file.exists():
        return file.read_text(encoding="utf-8").strip()
    if not checkpoint:  # the time of a resumed training is not known
        note += f", {done.metrics['train_runtime']:.0f} s on {_machine(trainer)}"
    if trainer.is_world_process_zero():
        write_whole(file, note + "\n")
    return note


def _machine(trainer: "ReRAMTrainer") -> str:
    if trainer.args.device.type == "cuda":
        return f"{trainer.args.world_size} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads() * trainer.args.world_size} CPU threads"


def write_comparison(
    folder: str | Path, reports: Mapping[str, RobustnessReport], metric: str | None = None, title: str | None = None
) -> None:
    """``report.md``, ``report.json`` and ``robustness.png`` of several models' reports, the base's metrics and the
    command as the last report's ``about`` says."""
    folder, (first, *others) = Path(folder), list(reports.values())
    metric = metric or first.metrics[0]
    last, about = first.times[-1], list(reports.values())[-1].about
    base, control = about.get("base_metrics") or first.digital or {}, about.get("control_metrics") or {}
    looks: dict[str, Any] = {"metric": metric, "labels": list(reports), "title": title}
    first.plot(folder / "robustness.png", *others, digital=base, control=control, **looks)
    chips = over_chips(comparison_cells(reports, metric), same_temperature(reports))
    parts = [
        f"{escaped(metric)}, {escaped(chips)}:",
        comparison_table(reports, metric, digital=digital_rows(base, control)),
    ]
    if len(first.metrics) > 1:
        details = about.get("details", ())
        fewer = over_fewer(metrics_cells(reports, last, details))
        parts += [
            f"Every metric after {format_time(last)}{escaped(fewer)}:",
            metrics_table(reports, last, digital=digital_rows(base, control), metrics=details),
        ]
    parts += ["\n".join(f"- {escaped(note)}" for note in first.notes)] if first.notes else []
    for label, report in reports.items():
        if report.uncalled:
            silent = escaped(f"{label}: {', '.join(report.uncalled)}")
            parts.append(f"Crossbar layers that were not called, and so were no chip, of {silent}.")
    if about.get("command"):
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        parts += [f"Measured on {about['date']} with {versions}:", code_block(about["command"], "bash")]
    write_whole(folder / "report.md", "\n\n".join(part.strip() for part in parts) + "\n")
    text = json.dumps({label: report.to_dict() for label, report in reports.items()}, indent=2)
    write_whole(folder / "report.json", text + "\n")


def claim_folder(folder: str | Path, settings: Mapping[str, Any], model: nn.Module, dataset: Any, holds: str) -> None:
    """Note in ``folder`` what is trained there, or refuse it where that is something else. With several processes the
    first one does so, and the others wait.

    Args:
        settings: JSON values, such as :func:`hf_reram.tasks.recipe_settings`.
        model: before its training. dataset: that it is trained on. holds: what the folder holds, for the error.

    Raises:
        ValueError: the folder holds a training of another model, on other data or with other settings; names what
            differs. Or it holds a model or checkpoints, and does not say of what.
        RuntimeError: in the other processes, that the first one has failed.
    """

    def claim() -> None:
        content = {"base": described(model), "training data": _content_of(dataset)}
        _claim(Path(folder), {"settings": dict(settings), "content": content}, holds, "")

    _by_first(claim)


def _by_first(do: Callable[..., None], *given: Any) -> None:
    """Have the first process do it; the others wait, and fail where it fails."""
    with alike(processes() > 1, "the check of a folder"):
        if is_first():
            do(*given)


def _claim(folder: Path, what: dict[str, Any], holds: str = "a comparison", homes: str = "*/") -> None:
    """Note in the folder what is compared there, or check that it is the same as before."""
    _refuse_others(folder, what, holds, homes)
    if not (file := folder / PROTOCOL).exists():
        write_whole(file, json.dumps(what, indent=2, default=str) + "\n")


def _refuse_others(folder: Path, what: dict[str, Any], holds: str = "a comparison", homes: str = "*/") -> None:
    """Refuse a folder where something else is compared, or where nothing tells what was trained. What only one side
    says is another value too, such as a flag of another version of transformers.

    Args:
        homes: pattern of the folders inside that models are trained in.
    """
    if not (file := folder / PROTOCOL).exists():
        left = sorted(path for name in TRAINED for path in folder.glob(f"{homes}{name}"))
        if left := [path for path in left if not (path.parent / PROTOCOL).exists()]:
            raise ValueError(
                f"{folder} holds {', '.join(str(path.relative_to(folder)) for path in left[:3])} and no {PROTOCOL}, "
                "which would tell what was trained there: allowed is another folder"
            )
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(what, default=str))
    changed = sorted(
        f"{part}.{name}"
        for part in now
        for name in (now[part] if part == "content" else now[part].keys() | before.get(part, {}).keys())
        if now[part].get(name) != before.get(part, {}).get(name)
    )
    if changed:
        hint = "; where evaluate itself changes it, as a file that it writes, say with key=... what is evaluated"
        told = hint if any(name.startswith("content.evaluation.") for name in changed) else ""
        raise ValueError(
            f"{folder} holds {holds} with other values of {changed}: allowed are the same ones, which "
            f"resumes it, or another folder{told}"
        )
