"""What commands print: tables for people, JSON for programs, errors in one line."""

import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

console = Console()


def reported(command: Callable) -> Callable:
    """The command, with errors that a user can mend as one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        warnings.filterwarnings("ignore", category=UserWarning)
        try:  # what the Hub and datasets do not find or allow is an OSError too
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error

    return run


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
