"""A checkpoint on the Hub: weights, config, report, plot and card in one commit, or nothing of it."""

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from transformers.utils import logging

from ..evaluation.files import write_whole
from ..evaluation.report import RobustnessReport
from ..model.adapters import has_adapters
from ..model.digest import weights_digest
from ..model.find import crossbar_layers, crossbar_state
from .about import about_model
from .load import ADAPTER, has_file, load_model
from .publish import COMPARISON, PLOT, merge_cards, publish, read_comparison
from .report import REPORT, report_of, unmeasured

logger = logging.get_logger(__name__)

# Nothing that has to be unpickled or run, nothing of a training in progress.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".png", ".jpg", ".svg", ".csv")
OTHERS = ("LICENSE", "NOTICE")
FOLDERS = ("additional_chat_templates",)
LEFT_OUT = ("trainer_state.json",)
# Of the files before, these would speak of, or be read instead of, the new weights.
REPLACED = (REPORT, COMPARISON, PLOT, "model.safetensors.index.json")
PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def push(
    folder: str | os.PathLike,
    repo: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    description: str | None = None,
    create_pr: bool = False,
    verify: bool = True,
) -> CommitInfo:
    """Upload a checkpoint's folder to the Hub, creating the repository if need be.

    All files go up in one commit: an upload that fails or is interrupted leaves the repository as it was, and can be
    repeated. The card is written anew from the report in the folder; text that people have added to the card, here or
    on the Hub, is kept. Files that have to be unpickled are left out.

    Args:
        folder: with config.json and safetensors, as ``save_pretrained`` writes it.
        repo: Hub id. private: of a new repository. revision: branch; create_pr: as a pull request instead.
        verify: load the model to see whether the report was measured on these weights.

    Raises:
        ValueError: no checkpoint of hf_reram, or its report was measured on other weights.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses.
    """
    folder = Path(folder)
    if verify:
        prepare(folder, load_model(folder), repo)
    files = _files(folder)
    api = HfApi(token=token)
    name = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(name, branch=revision, exist_ok=True)
    there = _remote(api, name, revision)
    if "README.md" in there:
        _keep_remote_text(api, name, revision, folder / "README.md")
    operations: list[Any] = [CommitOperationAdd(path, str(folder / path)) for path in files]
    operations += [CommitOperationDelete(path) for path in there if _replaced(path) and path not in files]
    return api.create_commit(
        name,
        operations,
        commit_message=message or "Upload a model that is robust on ReRAM crossbars",
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )


def prepare(folder: str | os.PathLike, model: Any, repo: str | None = None) -> None:
    """Make a checkpoint's folder ready for the Hub: report and plot if there is a report of these weights, and a card.

    Args:
        model: whose weights the folder holds.

    Raises:
        ValueError: the model is not patched, or the folder's report was measured on other weights.
    """
    folder = Path(folder)
    if not crossbar_layers(model):
        base = f", nor has {model.name_or_path}, its adapters' base" if has_adapters(model) else ""
        raise ValueError(f"{folder} holds no model on crossbars: no ReRAM quantization_config in its config.json{base}")
    file, rows = folder / REPORT, None
    report: RobustnessReport | None
    if file.exists():
        report = RobustnessReport.from_json(file)
        if report.weights != weights_digest(model):
            raise ValueError(
                f"{file} was measured on other weights than those beside it: evaluate this model again, or delete it"
            )
        rows = read_comparison(folder / COMPARISON) if (folder / COMPARISON).exists() else None
    elif (report := report_of(model)) is None and crossbar_state(model).report is not None:
        logger.warning("the weights have changed since evaluate_robustness: report and plot are not uploaded")
    if report is None:
        report = unmeasured(model, repo)
    elif not report.about:
        report.about = about_model(model, report, repo).to_dict()
    if repo is not None:
        report.about["repo"] = repo
    publish(folder, report, rows)


def save_processor(model: Any, folder: str | os.PathLike) -> None:
    """Save the tokenizer or image processor that the model's checkpoint came with, unless the folder has one."""
    name = getattr(model, "name_or_path", "")
    if not name or any((Path(folder) / file).exists() for file in PROCESSORS):
        return
    if not any(has_file(name, file) for file in PROCESSORS):  # AutoProcessor would make up an empty tokenizer
        return
    from transformers import AutoProcessor

    try:
        AutoProcessor.from_pretrained(name).save_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("the tokenizer or image processor of %s cannot be loaded and is not saved: %s", name, error)


def _files(folder: Path) -> list[str]:
    """What goes to the Hub, relative to the folder.

    Raises:
        ValueError: config.json (or that of PEFT's adapters) or safetensors are missing.
    """
    paths = [path for path in folder.iterdir() if path.is_file()]
    paths += [path for name in FOLDERS for path in (folder / name).glob("*") if path.is_file()]
    wanted = [
        path
        for path in sorted(paths)
        if (path.suffix in SUFFIXES or path.name in OTHERS)
        and path.name not in LEFT_OUT
        and not path.name.startswith((".", "_"))
    ]
    if left := sorted(path.name for path in set(paths) - set(wanted)):
        logger.info("not uploaded: %s", ", ".join(left))
    names = [path.relative_to(folder).as_posix() for path in wanted]
    if not {"config.json", ADAPTER} & set(names) or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds {sorted(p.name for p in paths)}: missing is config.json or a safetensors file"
        )
    return names


def _remote(api: HfApi, repo: str, revision: str | None) -> list[str]:
    try:
        return api.list_repo_files(repo, revision=revision)
    except RevisionNotFoundError:  # of a pull request to be
        return []


def _replaced(path: str) -> bool:
    return path in REPLACED or (path.endswith(".safetensors") and "/" not in path)


def _keep_remote_text(api: HfApi, repo: str, revision: str | None, card: Path) -> None:
    """Take what people have written into the card on the Hub over into the one to be uploaded."""
    with tempfile.TemporaryDirectory() as folder:  # not the cache, which may be read-only or stale
        path = api.hf_hub_download(repo, "README.md", revision=revision, local_dir=folder)
        text = Path(path).read_text(encoding="utf-8")
    new = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    write_whole(card, str(merge_cards(text, new, f"README.md of {repo}")).strip() + "\n")
