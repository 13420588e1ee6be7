"""What commands print: tables for people, JSON for programs, errors in one line."""

import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from ..evaluation.escape import one_line

console = Console()

TRACEBACK = "HF_RERAM_TRACEBACK"  # set in the environment, errors are shown with where they came from
MENDABLE = (ValueError, OSError, ImportError)  # whose message says it all


def reported(command: Callable) -> Callable:
    """The command, with its errors as one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        if not sys.stderr.isatty():
            _no_bars()
        try:  # what the Hub and datasets do not find or allow is an OSError too
            return command(*args, **kwargs)
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or os.environ.get(TRACEBACK):
                raise
            kind = "" if isinstance(error, MENDABLE) and str(error) else f"{type(error).__name__}: "
            print(f"error: {kind}{one_line(_why(error))}", file=sys.stderr)
            raise typer.Exit(1) from error

    return run


def _no_bars() -> None:
    """In a file or a pipe the bars of what is loaded would be what an error stands between."""
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when it is first imported
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()


def _why(error: BaseException) -> str:
    """What datasets puts around the error of a file that cannot be read says less than that does."""
    cause = error.__cause__
    if type(error).__module__.startswith("datasets.") and cause is not None and str(cause):
        return f"{error}: {cause}"
    return str(error)


def writable(folder: Path) -> Path:
    """The folder, made if need be; looked at before the work, so that its results can be written.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} is no folder that can be written to: {error.strerror or error}") from error
    return folder


def say(text: str) -> None:
    """A line for people, as it is: brackets in names are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=escape(one_line(title)))
    for i, name in enumerate(head):
        table.add_column(escape(one_line(name)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(one_line(cell)) for cell in row))
    console.print(table)
