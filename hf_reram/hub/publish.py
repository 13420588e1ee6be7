"""A checkpoint's folder made ready for the Hub: report, comparison, plot and card beside the weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import yaml_dump
from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.checks import read_json, refuse_deep, shown
from ..evaluation.files import write_whole
from ..evaluation.report import RobustnessReport
from .about import About
from .card import BEGIN, END, UNMEASURED, model_card
from .report import REPORT

logger = logging.get_logger(__name__)

MOST_METADATA = 100_000  # values on one level: YAML's aliases can make millions of a few lines
CARD, PLOT, COMPARISON = "README.md", "robustness.png", "comparison.json"
# Of the cards that transformers and peft write by themselves, which say nothing.
BLANK = ("This model card has been automatically generated.", "# Model Card for Model ID")


def write_card(path: str | Path, card: ModelCard) -> ModelCard:
    """Write a card so that what a person has written in the file there stays: the text outside the marks, and metadata
    that the new card does not set.

    Returns:
        What is in the file now.

    Raises:
        ValueError: the file there is a card whose marks are damaged.
    """
    path = Path(path)
    if path.exists() and (old := read_text(path)).strip():
        card = merge_cards(old, card, path)
    write_whole(path, str(card).strip() + "\n")
    return card


def read_text(path: str | Path) -> str:
    """A card's text.

    Raises:
        ValueError: it is none.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def merge_cards(old: str, new: ModelCard, where: str | Path = "the card") -> ModelCard:
    """``new`` with what people have written in ``old``: text outside the marks that ``new`` has not too, and metadata
    that it does not set.

    Args:
        old: text of a card; one without marks is kept whole, below. where: for the error.

    Raises:
        ValueError: ``old`` has damaged marks, or metadata that cannot be read.
    """
    card = read_card(old, where)
    text = "" if any(blank in card.text for blank in BLANK) else card.text
    if (BEGIN in text) != (END in text):
        raise ValueError(f"{where} holds only one of the marks {BEGIN!r} and {END!r}: allowed are both or none")
    (above, _, below), (before, core, after) = _split(text), _split(new.text)
    text = f"{_joined(before, above)}{core}{_joined(after, below)}"
    kept = card.data.to_dict()
    kept.pop("model-index", None)  # figures of the weights before
    data = kept | new.data.to_dict()
    for key in ("tags", "datasets", "metrics"):
        more = [v for v in _listed(kept.get(key)) if v not in _listed(data.get(key))]
        if more:
            data[key] = [*_listed(data.get(key)), *more]
    return ModelCard(f"---\n{yaml_dump(data)}---\n{text}")


def read_card(text: str, where: str | Path = "the card") -> ModelCard:
    """A card that a stranger may have written.

    Raises:
        ValueError: its metadata are no YAML of names and values, or too deep or too many.
    """
    try:
        found = REGEX_YAML_BLOCK.search(text)
        refuse_deep("its metadata", yaml.safe_load(found[2]) if found else None, MOST_METADATA)
        return ModelCard(text, ignore_metadata_errors=True)
    except RecursionError:
        raise ValueError(f"{where}: its metadata are nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}: its metadata cannot be read, mend or delete them: {error}") from error


def _split(text: str) -> tuple[str, str, str]:
    """What stands before, between (with them) and after the marks; without marks all stands after."""
    if BEGIN not in text:
        return "", "", f"\n\n{text.strip()}\n" if text.strip() else ""
    before, begin, rest = text.partition(BEGIN)
    core, end, after = rest.partition(END)
    return before, begin + core + end, after


def _joined(own: str, other: str) -> str:
    if other.strip() in own:
        return own
    return other if own.strip() in other else f"{own.rstrip()}\n\n{other.strip()}\n\n"


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def publish(
    folder: str | Path,
    report: RobustnessReport,
    comparison: Mapping[str, RobustnessReport] | None = None,
    title: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    configs: Sequence[ReRAMConfig] | None = None,
) -> None:
    """Put report, comparison, plot and card beside a checkpoint's weights: ``robustness.json``, ``comparison.json``,
    ``robustness.png`` and ``README.md``, ready for the Hub. Files of an earlier report are removed.

    Args:
        report: without measurements there is only a card, which says so.
        title: of the plot. metadata: more of the card's, such as ``license``.
        configs: see :func:`.card.model_card`.
    """
    folder, about = Path(folder), About.from_dict(report.about)
    rows = dict(comparison or {})
    card = model_card(report, rows or None, configs=configs)
    data: Any = card.data
    for key, value in (metadata or {}).items():
        if key == "tags":
            value = [*data.tags, *(tag for tag in _listed(value) if tag not in data.tags)]
        setattr(data, key, value)
    for name, written in ((REPORT, report.measurements), (PLOT, report.measurements), (COMPARISON, rows)):
        if not written:
            (folder / name).unlink(missing_ok=True)
    if rows:
        text = json.dumps({label: row.to_dict() for label, row in rows.items()})
        write_whole(folder / COMPARISON, text + "\n")
    if report.measurements:
        report.to_json(folder / REPORT)
        reports = rows or {about.name: report}
        first, *others = reports.values()
        looks: Any = {"metric": about.metric, "labels": list(reports), "title": title}
        looks |= {"digital": about.base_metrics, "control": about.control_metrics}
        first.plot(folder / PLOT, *others, **looks)
    write_card(folder / CARD, card)


def remove_foreign(folder: Path, weights: str) -> None:
    """Remove what :func:`publish` and the like have written of other weights than those that are in a folder now, and
    say so: report, comparison, plot, and what a card says of them. Files that are none of these stay, what people have
    written in the card, and what nothing says the weights of: figures of older reports, and plot and card where report
    and comparison are gone or cannot be read, of which a warning tells.

    Args:
        weights: the digest of those there now.
    """
    report, rows = _told(RobustnessReport.from_json, folder / REPORT), _told(read_comparison, folder / COMPARISON)
    of_report = report is not None and report.weights not in ("", weights)
    of_rows = rows is not None and {"", weights}.isdisjoint(row.weights for row in rows.values())
    shown = of_rows if report is None else of_report  # what the plot and the card are of
    if shown and (text := _card_with_figures(folder)):
        logger.warning("%s: removing what %s says of other weights than those there now", folder, CARD)
        write_whole(folder / CARD, _without_figures(text))
    foreign = [(REPORT, of_report), (PLOT, shown), (COMPARISON, of_rows)]
    if there := [name for name, other in foreign if other and (folder / name).exists()]:
        logger.warning("%s: removing %s, which are of other weights than those there now", folder, ", ".join(there))
    for name in reversed(there):  # last what tells of the others
        (folder / name).unlink()


def _told(read: Callable[[Path], Any], path: Path) -> Any:
    """What a file of figures holds; None where there is none, or, with a warning, where it cannot be read."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(
            "%s cannot be read, so that nothing tells whether its figures are of these weights: %s", path, error
        )
        return None


def holds_figures(folder: Path) -> bool:
    """Whether :func:`publish` and the like have left figures in a folder, of whichever weights."""
    return any((folder / name).exists() for name in (REPORT, COMPARISON)) or bool(_card_with_figures(folder))


def _card_with_figures(folder: Path) -> str:
    """The text of a card whose part between the marks is of a report; else empty."""
    try:
        text = read_text(folder / CARD)
    except (OSError, ValueError):  # none, or a person's
        return ""
    core = text.partition(BEGIN)[2].partition(END)
    return text if core[1] and core[0].strip() and UNMEASURED not in core[0] else ""


def _without_figures(text: str) -> str:
    """A card with nothing between its marks, and without figures in its metadata."""
    before, rest = text.split(BEGIN, 1)
    text = f"{before}{BEGIN}\n\n{END}{rest.partition(END)[2]}"
    try:
        card = read_card(text)
    except ValueError:  # metadata that a person has written
        return text
    data: dict[str, Any] = card.data.to_dict()
    if data.pop("model-index", None) is None:
        return text
    return f"---\n{yaml_dump(data)}---\n{card.text}"


def read_comparison(path: str | Path) -> dict[str, RobustnessReport]:
    """What :func:`publish` wrote as ``comparison.json``: reports by label.

    Raises:
        ValueError: it holds something else.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path} holds {shown(data)}: allowed is an object of robustness reports by label")
    found = {label: RobustnessReport.from_dict(row, path) for label, row in data.items()}
    if empty := [label for label, report in found.items() if not report.measurements]:
        raise ValueError(f"{path} holds no measurements of {shown(empty)}: allowed is at least one of each")
    return found
