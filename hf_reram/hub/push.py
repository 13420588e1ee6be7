"""A checkpoint on the Hub: weights, config, report, plot and card in one commit, or nothing of it."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from transformers.utils import logging

from ..device.checks import read_json
from ..evaluation.files import write_whole
from ..evaluation.report import RobustnessReport
from ..model.adapters import has_adapters
from ..model.find import crossbar_layers, crossbar_state, crossbar_states
from ..training.checkpoints import CONFIGS
from .about import about_model
from .crossbars import CROSSBARS, save_crossbars
from .load import ADAPTER, has_file, load_model
from .publish import CARD, COMPARISON, PLOT, merge_cards, publish, read_card, read_comparison, read_text
from .report import PARTS, REPORT, report_of, told_for, unmeasured, why_foreign

logger = logging.get_logger(__name__)

# Nothing that has to be unpickled or run, nothing of a training in progress.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".png", ".jpg", ".svg", ".csv")
OTHERS = ("LICENSE", "NOTICE")
FOLDERS = ("additional_chat_templates",)
LEFT_OUT = ("trainer_state.json", CONFIGS)
# Of the files before, these would speak of, or be read instead of, the new weights.
REPLACED = (REPORT, COMPARISON, PLOT)
WEIGHTS = re.compile(r"model([.-][^/]*)?\.safetensors(\.index\.json)?")
OLDER_WEIGHTS = re.compile(r"(pytorch_model|tf_model|flax_model)([.-][^/]*)?\.(bin|h5|msgpack)")
ADAPTER_WEIGHTS = re.compile(r"adapter_model([.-][^/]*)?\.safetensors(\.index\.json)?")
CONFLICTS = (409, 412)  # what the Hub answers where the parent of a commit is not its branch's last one
TRIES = 5
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

    All files go up in one commit: an upload that fails or is interrupted leaves the repository as it was, and the
    folder, whose card names the repository, and can be repeated. Where somebody else commits meanwhile, the repository
    is read again, so that nothing of it is lost. Of the files there only those go that the new ones replace: weights,
    and report and plot of other weights; adapters replace adapters alone. The card is written anew from the report in
    the folder; text that people have added to it, here or on the Hub, is kept. Files that have to be unpickled are left
    out.

    Args:
        folder: with config.json and safetensors, as ``save_pretrained`` writes it.
        repo: Hub id. private: of a new repository. revision: branch; create_pr: as a pull request instead.
        verify: load the model to see whether the report was measured on these weights.

    Raises:
        ValueError: no checkpoint of hf_reram, or its report was measured on other weights.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses; others committed during each of five tries.
    """
    folder = Path(folder)
    with as_before_unless_done(folder):
        if verify:
            prepare(folder, load_model(folder), repo)
        return _upload(folder, repo, private, token, revision, message, description, create_pr)


@contextmanager
def as_before_unless_done(folder: str | os.PathLike) -> Iterator[None]:
    """Around an upload and what makes a folder ready for it: if it fails, card, report and the like are as before."""
    paths = [Path(folder) / name for name in (CARD, *REPLACED)]
    before = [path.read_bytes() if path.exists() else None for path in paths]
    try:
        yield
    except BaseException:
        for path, content in zip(paths, before):
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise


def _upload(
    folder: Path,
    repo: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str | None,
    description: str | None,
    create_pr: bool,
) -> CommitInfo:
    files = _files(folder)
    api = HfApi(token=token)
    name = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(name, branch=revision, exist_ok=True)
    own_card = (folder / CARD).read_text(encoding="utf-8") if CARD in files else None
    for left in reversed(range(TRIES)):
        parent = _last_commit(api, name, revision)
        there = [] if parent is None else api.list_repo_files(name, revision=parent)
        mine = _own(files, there)
        if mine != files:
            kept = ", ".join(sorted(set(files) - set(mine)))
            logger.warning("%s holds a whole model, whose files stay; the adapters' do not go up: %s", name, kept)
        if own_card is not None:
            write_whole(folder / CARD, own_card)  # without what an earlier try has taken over
        if CARD in there and CARD in mine:
            _keep_remote_text(api, name, parent, folder / CARD)
        # Made anew for each try: they keep what they have seen on the Hub.
        operations: list[Any] = [CommitOperationAdd(path, str(folder / path)) for path in mine]
        operations += [CommitOperationDelete(path) for path in _stale(files, there)]
        try:
            return api.create_commit(
                name,
                operations,
                commit_message=message or "Upload a model that is robust on ReRAM crossbars",
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in CONFLICTS:
                raise
            if not left:
                error.append_to_message(f"\n{name} was changed in each of {TRIES} tries: nothing went up, push again")
                raise
            logger.warning("%s was changed while it was being pushed to: what is there now is read again", name)
    raise AssertionError("the last try returns or raises")


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
    if has_adapters(model) and not (folder / CROSSBARS).exists():
        save_crossbars(model, folder)
    file, rows = folder / REPORT, None
    report: RobustnessReport | None
    if file.exists():
        report = RobustnessReport.from_json(file)
        if why := why_foreign(model, report):
            raise ValueError(f"{file} was measured {why}, not on what is beside it: evaluate it again, or delete it")
        report = told_for(model, report)
        if (folder / COMPARISON).exists():
            rows = {label: told_for(model, row) for label, row in read_comparison(folder / COMPARISON).items()}
    elif (report := report_of(model)) is None and crossbar_state(model).report is not None:
        logger.warning("the weights have changed since evaluate_robustness: report and plot are not uploaded")
    if report is None:
        report = unmeasured(model, repo)
    elif not report.about:
        report.about = about_model(model, report, repo).to_dict()
    if repo is not None:
        report.about["repo"] = repo
    publish(folder, report, rows, configs=[state.config for state in crossbar_states(model)])


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


def is_safe(file: str) -> bool:
    """Whether a file of this name is one that may go to the Hub: nobody has to unpickle or run it."""
    return (Path(file).suffix in SUFFIXES or file in OTHERS) and not file.startswith((".", "_"))


def _files(folder: Path) -> list[str]:
    """What goes to the Hub, relative to the folder.

    Raises:
        ValueError: config.json (or that of PEFT's adapters) or safetensors are missing.
    """
    paths = [path for path in folder.iterdir() if path.is_file()]
    paths += [path for name in (*FOLDERS, *_modules(folder)) for path in (folder / name).glob("*") if path.is_file()]
    wanted = [path for path in sorted(paths) if is_safe(path.name) and path.name not in LEFT_OUT]
    if left := sorted(path.name for path in set(paths) - set(wanted)):
        logger.info("not uploaded: %s", ", ".join(left))
    names = [path.relative_to(folder).as_posix() for path in wanted]
    if not {"config.json", ADAPTER} & set(names) or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds {sorted(p.name for p in paths)}: missing is config.json or a safetensors file"
        )
    return names


def _modules(folder: Path) -> list[str]:
    """Folders of a SentenceTransformer's modules, beside the first one, which is in the folder itself."""
    file = folder / PARTS
    listed = read_json(file) if file.exists() else []
    paths = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\d+_\w+", path)]


def _last_commit(api: HfApi, repo: str, revision: str | None) -> str | None:
    try:
        return api.repo_info(repo, revision=revision).sha
    except RevisionNotFoundError:  # of a pull request to be
        return None


def _is_model(files: Iterable[str]) -> bool:
    """Whether the files hold a whole model: weights that are no adapters'."""
    return any(WEIGHTS.fullmatch(path) or OLDER_WEIGHTS.fullmatch(path) for path in files)


def _own(files: list[str], there: list[str]) -> list[str]:
    """What goes up of ``files``: adapters that join a whole model leave its card, report and tokenizer as they are."""
    if _is_model(files) or not _is_model(there):
        return files
    return [
        path for path in files if path not in there or path in (ADAPTER, CROSSBARS) or ADAPTER_WEIGHTS.fullmatch(path)
    ]


def _stale(files: list[str], there: list[str]) -> list[str]:
    """Of the files ``there`` those that would speak of, or be read instead of, the new weights.

    Adapters replace adapters alone. A whole model replaces the one before it, and adapters where these were all that
    was there: they would be put on its weights.
    """
    if not _is_model(files):
        replaced = [] if _is_model(there) else [*REPLACED, CROSSBARS]
        weights = [ADAPTER_WEIGHTS]
    else:
        alone = not _is_model(there)
        replaced = [*REPLACED, *([ADAPTER, CROSSBARS] if alone else [])]
        weights = [WEIGHTS, *([ADAPTER_WEIGHTS] if alone else [])]
    return [
        path
        for path in there
        if path not in files and (path in replaced or any(pattern.fullmatch(path) for pattern in weights))
    ]


def _keep_remote_text(api: HfApi, repo: str, revision: str | None, card: Path) -> None:
    """Take what people have written into the card on the Hub over into the one to be uploaded."""
    with tempfile.TemporaryDirectory() as folder:  # not the cache, which may be read-only or stale
        path = api.hf_hub_download(repo, CARD, revision=revision, local_dir=folder)
        text = read_text(path)
    new = read_card(read_text(card), card)
    write_whole(card, str(merge_cards(text, new, f"README.md of {repo}")).strip() + "\n")
