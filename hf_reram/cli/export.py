"""``hf-reram export``."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.array_files import ABOUT, FORMATS
from ..model.export import export_conductances
from ..model.summary import summarize
from .model import patched, words
from .output import say, show_json


def export(
    model: Annotated[str, typer.Argument(help="Hub id or folder, of a robust checkpoint or a plain one.")],
    folder: Annotated[Path, typer.Argument(help="New, or empty.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of a chip; default what the cells are to be programmed to.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Of a chip, since programming; default right after.")] = None,
    temperature: Annotated[str | None, typer.Option(help="Of a chip: K, or such as 85C; default the config's.")] = None,
    formats: Annotated[list[str] | None, typer.Option(help=f"Default {','.join(FORMATS)}.")] = None,
    device: Annotated[str | None, typer.Option(help="Cells of a plain checkpoint: preset or JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """A model's conductances in µS, tile by tile, with layout, scales and a README for those who program them.

    What is read back from the cells goes into the same files; `hf-reram eval MODEL --conductances FOLDER` then
    evaluates the model on them. Nothing is known of the inputs of a plain checkpoint, which is not calibrated.
    """
    found, _ = patched(model, device, headless=True)
    export_conductances(found, folder, time, temperature, seed, words(formats, "--formats") or FORMATS)
    cells = summarize(found).cells
    if as_json:
        show_json({"folder": str(folder), "about": str(folder / ABOUT), "seed": seed, "cells": cells})
        return
    what = "targets of cells" if seed is None else f"cells of simulated chip {seed}"
    say(f"Written: {folder}, {cells:,} {what}; its README.md says what is where")
