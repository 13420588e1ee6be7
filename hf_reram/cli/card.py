"""``hf-reram card`` and ``hf-reram push``."""

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import ModelCard

from ..evaluation.report import RobustnessReport
from ..hub.load import load_model
from ..hub.push import prepare
from ..hub.push import push as upload
from ..hub.report import REPORT
from .output import say, show_json


def card(
    folder: Annotated[Path, typer.Argument(help="Of a checkpoint, with its robustness.json.")],
    repo: Annotated[str | None, typer.Option(help="Hub id that the card names.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card's metadata as JSON.")] = False,
) -> None:
    """Write the model card of a checkpoint from its robustness report; what people have added to it is kept."""
    prepare(folder, load_model(_existing(folder)), repo)
    path = folder / "README.md"
    if as_json:
        show_json(ModelCard.load(path).data.to_dict())
    else:
        say(f"Written: {path}")


def push(
    folder: Annotated[Path, typer.Argument(help="Of a checkpoint.")],
    repo: Annotated[str, typer.Argument(help="Hub id, such as me/robust-model; created if need be.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the commit as JSON.")] = False,
) -> None:
    """Upload a checkpoint with report, plot and card in one commit. Log in with `hf auth login` or HF_TOKEN."""
    found = upload(_existing(folder), repo, private, None, revision, message, None, create_pr)
    if as_json:
        show_json({"url": str(found.commit_url), "oid": found.oid, "pull_request": found.pr_url})
    else:
        say(f"Pushed: {found.pr_url or found.commit_url}")


def _existing(folder: Path) -> Path:
    """
    Raises:
        ValueError: its report is none; said before the model is loaded, which would warn of it too.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if (report := folder / REPORT).exists():
        RobustnessReport.from_json(report)
    return folder
