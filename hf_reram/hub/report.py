"""A robust checkpoint's robustness report: found beside the weights, and held against them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file, extract_commit_hash, logging

from ..evaluation.report import RobustnessReport
from ..model.digest import other_settings, settings_of, weights_digest
from ..model.find import crossbar_state, crossbar_states
from ..model.summary import summarize
from .about import about_model

logger = logging.get_logger(__name__)

REPORT = "robustness.json"
PARTS = "modules.json"  # beside the first part of a SentenceTransformer

# torch's names of floating-point types as safetensors spells them.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_report(name: str | os.PathLike, **where: Any) -> RobustnessReport | None:
    """The report beside a checkpoint's weights, or None.

    Args:
        name: folder or Hub id. where: ``revision``, ``token`` and others as in ``from_pretrained``.

    Raises:
        ValueError: the file there is no robustness report.
    """
    try:
        path = cached_file(name, REPORT, **where)
    except OSError:  # no such file, or no way to it
        return None
    return None if path is None else RobustnessReport.from_json(path)


def report_of(model: nn.Module) -> RobustnessReport | None:
    """The report of a patched model as it is now: the one that :func:`hf_reram.evaluate_robustness` made of it last, or
    that came with its checkpoint. None where there is none, or where it was measured on other weights or hardware, or
    with another config of the model. Of a model that is deployed at another temperature by itself since, it says at
    which one it was measured.

    Raises:
        ValueError: the model is not patched.
    """
    report = crossbar_state(model).report
    return told_for(model, report) if report is not None and not why_foreign(model, report) else None


def told_for(model: nn.Module, report: RobustnessReport) -> RobustnessReport:
    """A patched model's report, with temperatures in kelvins where the model is deployed at another one by itself than
    when it was measured."""
    own = {state.config.kelvin for state in crossbar_states(model)}
    return report if own == {report.own_temperature} else report.in_kelvins()


def why_foreign(model: nn.Module, report: RobustnessReport) -> str:
    """Why a report is not a patched model's as it is now, in words: it was measured on other weights, other hardware or
    with another config of the model. Empty where it is the model's."""
    if report.weights != (found := weights_digest(model)):
        return f"on other weights (digest {report.weights[:12] or 'missing'}, these have {found[:12]})"
    other = other_settings(settings_of(model), report.model_config)  # of older reports nothing
    if report.config:  # says something of its hardware
        configs = [state.config for state in crossbar_states(model)]
        try:
            measured = report.configs()
        except ValueError as error:
            return f"with a config that cannot be read ({error})"
        if len(measured) != len(configs):
            return f"with {len(measured)} configs of parts, where the model's parts have {len(configs)}"
        fields = dict.fromkeys(name for one, now in zip(measured, configs) for name in one.other_hardware(now))
        kelvins = [[config.kelvin for config in every] for every in (measured, configs)]
        if None in report.temperatures and report.own_temperature is None and kelvins[0] != kelvins[1]:
            fields["temperature"] = None  # of parts at several, which no single one says
        other += fields
    return f"with another {', '.join(other[:8])}{', …' if len(other) > 8 else ''}" if other else ""


def unmeasured(model: Any, repo: str | None = None) -> RobustnessReport:
    """A report without measurements, for the card of a model that was not evaluated."""
    config, *others = (state.config.to_dict() for state in crossbar_states(model))
    report = RobustnessReport([], config=config, summary=str(summarize(model)), other_configs=others)
    report.about = about_model(model, None, repo).to_dict()
    return report


def attach_stored_report(model: Any, files: Sequence[str] | None) -> None:
    """Give a loaded model the report beside its checkpoint, or warn that it was measured on other weights.

    Args:
        files: the checkpoint's weight files. Weights that were loaded in another dtype cannot be compared: the model
            then has no report.
    """
    name = getattr(model, "name_or_path", "")
    if not name or not files or any(p.is_meta for p in model.parameters()):
        return
    commit = extract_commit_hash(files[0], None)
    try:
        report = stored_report(name, **({} if commit is None else {"revision": commit}))
    except ValueError as error:
        logger.warning("the robustness report of %s cannot be read: %s", name, error)
        return
    if report is None or _dtypes_of(files) != {str(p.dtype).removeprefix("torch.") for p in _floats(model)}:
        return
    if (Path(files[0]).parent / PARTS).exists():
        crossbar_state(model).report = report  # of the whole SentenceTransformer, against which report_of holds it
    else:
        attach_report(model, report, name)


def attach_report(model: Any, report: RobustnessReport, name: str | os.PathLike) -> None:
    """Give a patched model a report that came from ``name``, or warn that it was measured on other weights or
    hardware."""
    if why := why_foreign(model, report):
        logger.warning("%s: its %s was measured %s: its figures are not this model's", name, REPORT, why)
    else:
        crossbar_state(model).report = report


def _floats(model: nn.Module):
    return (t for t in model.state_dict().values() if t.is_floating_point())


def _dtypes_of(files: Sequence[str]) -> set[str]:
    """Floating-point types in the files, as torch calls them."""
    found = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    return {_FLOATS[kind] for kind in found if kind in _FLOATS}
