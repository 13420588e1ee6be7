"""Commands whose usage errors are one line, as all their errors are."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import typer
from typer.core import TyperGroup

from ..evaluation.escape import one_line

UsageError: Any = typer.BadParameter.__base__  # click's, or that of the copy of click in typer


class Commands(TyperGroup):
    """What typer says of a wrong option on six lines is one on stderr here, with its exit code; help stays as it is."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """As click's; the context knows what the commands were given."""
        given = list(args)  # which parsing empties
        with _in_one_line(given):
            context = super().make_context(info_name, args, parent, **extra)
        context.obj = given
        return context

    def invoke(self, ctx: Any) -> Any:
        """As click's."""
        with _in_one_line(ctx.obj, ctx):
            return super().invoke(ctx)


@contextmanager
def _in_one_line(given: Sequence[str], context: Any = None) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if not given:  # its text is the help
            raise
        command = f"hf-reram {getattr(context, 'invoked_subcommand', None) or ''}".strip()
        told = _of_a_number(error, given) or error.format_message()
        print(f"{command}: {one_line(told)}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


def _of_a_number(error: Any, given: Sequence[str]) -> str:
    """What is wrong with the value of an option that takes a number, and what is allowed; empty of other errors."""
    parameter: Any = getattr(error, "param", None)
    words = [word.partition("=") for word in given]
    places = [i for i, word in enumerate(words) if parameter is not None and word[0] in parameter.opts]
    if not places:  # an argument, or a value from elsewhere
        return ""
    option, equals, value = words[places[-1]]
    declared = inspect.signature(inspect.unwrap(error.ctx.command.callback)).parameters[parameter.name].annotation
    kinds, bounds = (declared.__origin__, *get_args(declared.__origin__)), declared.__metadata__[0]
    if int not in kinds and float not in kinds:
        return ""
    low = "" if bounds.min is None else f" from {bounds.min}"
    high = "" if bounds.max is None else f" to {bounds.max}"
    kind = "an integer" if int in kinds else "a number"
    return f"{option} {value if equals else given[places[-1] + 1]}: allowed is {kind}{low}{high}"
