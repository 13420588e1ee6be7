"""The command line's root: its commands, its version, and how it says what went wrong."""

from typing import Annotated

import typer

from ..version import __version__
from .card import card, push
from .demo import demo
from .device import device
from .evaluate import evaluate
from .export import export
from .fit import fit
from .harness import lm_eval
from .inspect import inspect
from .output import console, reported
from .usage import Commands

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrained models, robust on ReRAM crossbars.",
)
app.command()(reported(demo))
app.command("eval")(reported(evaluate))
app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)(reported(lm_eval))
app.command()(reported(inspect))
app.command()(reported(export))
app.command()(reported(device))
app.command()(reported(fit))
app.command()(reported(card))
app.command()(reported(push))


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
