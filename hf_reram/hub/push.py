"""A checkpoint on the Hub: weights, config, report, plot and card in one commit, or nothing of it."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file, logging

from ..evaluation.report import RobustnessReport, write_whole
from ..model.adapters import has_adapters, without_adapters
from ..model.digest import weights_digest
from ..model.patch import UPLOAD, crossbar_layers, crossbar_state, summarize
from ..version import __version__
from .about import About
from .card import AUTO_CLASSES
from .load import attach_report, report_of, stored_report
from .publish import COMPARISON, PLOT, REPORT, merge_cards, publish, read_comparison

logger = logging.get_logger(__name__)

# Nothing that has to be unpickled or run, nothing of a training in progress.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".png", ".jpg", ".svg", ".csv")
OTHERS = ("LICENSE", "NOTICE")
FOLDERS = ("additional_chat_templates",)
LEFT_OUT = ("trainer_state.json",)
# Of the files before, these would speak of, or be read instead of, the new weights.
REPLACED = (REPORT, COMPARISON, PLOT, "model.safetensors.index.json")
ADAPTER = "adapter_config.json"
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


def load_model(name: str | os.PathLike, **where: Any) -> Any:
    """A checkpoint's model in the class that its config names, out of transformers' own; one of PEFT's adapters on the
    checkpoint that they were trained on.

    Args:
        name: folder or Hub id. where: as in ``from_pretrained``.

    Raises:
        ValueError: the config names no such class.
    """
    if _has(name, ADAPTER, **where):
        from peft import PeftConfig, PeftModel

        base = load_model(PeftConfig.from_pretrained(str(name), **where).base_model_name_or_path)
        model = PeftModel.from_pretrained(base, name, **where)
        if crossbar_layers(model) and (report := stored_report(name, **where)) is not None:
            attach_report(model, report, name)
        return model
    config = AutoConfig.from_pretrained(name, **where)
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture).from_pretrained(name, config=config, **where)
    raise ValueError(f"{name}: architectures={config.architectures!r}: allowed is a class of transformers")


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


def unmeasured(model: Any, repo: str | None = None) -> RobustnessReport:
    """A report without measurements, for the card of a model that was not evaluated."""
    report = RobustnessReport([], config=crossbar_state(model).config.to_dict(), summary=str(summarize(model)))
    report.about = about_model(model, None, repo).to_dict()
    return report


def about_model(model: Any, report: RobustnessReport | None, repo: str | None = None, **known: Any) -> About:
    """What a model and its report say for the card by themselves; ``known`` comes first."""
    base = getattr(model, "name_or_path", "") or ""
    folder = Path(base) if base else None
    local = folder is None or folder.exists()
    name = (repo or (folder.resolve().name if folder else "") or type(model).__name__).rpartition("/")[2]
    scored = [metric for metric in report.metrics if metric != "loss"] or report.metrics if report else [""]
    found = {
        "task": task_of(model),
        "metric": scored[0],
        "dataset": "",
        "dataset_split": "",
        "base_model": base if not local else folder.resolve().name if folder else type(model).__name__,
        "name": name,
        "relation": "adapter" if has_adapters(model) else "finetune",
        "repo": repo,
        "versions": {"hf_reram": __version__, "transformers": transformers.__version__},
    }
    return About(**{**found, **{key: value for key, value in known.items() if value is not None}})


def task_of(model: Any) -> str:
    """The Hub's pipeline tag of a model's class, "" where none fits."""
    model = without_adapters(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = {cls.__name__ for cls in type(model).__mro__}
    for task, auto in AUTO_CLASSES.items():
        # AutoModelForSpeechSeq2Seq: MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z])(?=[0-9])", "_", auto.removeprefix("AutoModelFor")).upper()
        found = getattr(modeling_auto, f"MODEL_FOR_{words}_MAPPING_NAMES").get(kind, ())
        if names & ({found} if isinstance(found, str) else set(found)):
            return task
    return ""


class Upload:
    """What uploads a patched model in place of ``PreTrainedModel._upload_modified_files``, through which go
    ``push_to_hub`` and ``save_pretrained(push_to_hub=True)``; a class, so that the model can be pickled and copied."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: Any = None,
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> CommitInfo:
        save_processor(self.model, working_dir)
        prepare(working_dir, self.model, repo_id)
        message, description = commit_message, commit_description
        return push(working_dir, repo_id, None, token, revision, message, description, create_pr, verify=False)


def attach_upload(model: Any) -> None:
    """Have the model's ``push_to_hub`` upload report and card too."""
    if hasattr(model, UPLOAD):
        model.__dict__[UPLOAD] = Upload(model)


def save_processor(model: Any, folder: str | os.PathLike) -> None:
    """Save the tokenizer or image processor that the model's checkpoint came with, unless the folder has one."""
    name = getattr(model, "name_or_path", "")
    if not name or any((Path(folder) / file).exists() for file in PROCESSORS):
        return
    if not any(_has(name, file) for file in PROCESSORS):  # AutoProcessor would make up an empty tokenizer
        return
    try:
        AutoProcessor.from_pretrained(name).save_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("the tokenizer or image processor of %s cannot be loaded and is not saved: %s", name, error)


def _has(name: str | os.PathLike, file: str, **where: Any) -> bool:
    try:
        return cached_file(name, file, **where) is not None
    except OSError:  # no such file, or no way to it
        return False


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
