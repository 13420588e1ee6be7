"""``hf-reram demo``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config import ReRAMConfig
from .output import console, say, writable


def demo(
    folder: Annotated[Path, typer.Argument(help="Where plot, report and checkpoint go.")] = Path("reram-demo"),
    chips: Annotated[int, typer.Option(min=2, help="Chips per row of the table.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of data split, training and chips.")] = 0,
    redundancy: Annotated[
        float, typer.Option(min=0, max=4, help="Cells on top, as a share, in all rows but the digital ones.")
    ] = ReRAMConfig.redundancy,
) -> None:
    """Handwritten digits on a hard device corner: digital, naive crossbar, and finetuned in four ways.

    Needs no network and no data; takes about two minutes on two cores.
    """
    import warnings

    from transformers.utils import logging

    from ..hub.about import digital_rows
    from ..tasks.demo import CORNER, METHODS, TIMES, run_demo

    writable(folder)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    console.print(f"[bold]Device corner[/]: {CORNER.name} ({CORNER.source})")
    console.print(
        f"g = {CORNER.g_min:g}–{CORNER.g_max:g} µS, b = {CORNER.b():g} unshrunk, spread of a half-on cell "
        + ", ".join(f"{float(CORNER.retention_std(CORNER.g_max / 2, t)):.1f} µS after {t}" for t in TIMES)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training the digital base", total=len(METHODS) + 2)

        def done(what: str) -> None:
            progress.console.print(f"  {what}")
            progress.update(task, advance=1, description="finetuning and evaluating")

        reports = run_demo(folder, chips=chips, seed=seed, redundancy=redundancy, progress=done)
    table = Table(title=f"Accuracy in %, mean ± standard deviation over {chips} chips")
    table.add_column("")
    for time in TIMES:
        table.add_column(f"after {time}", justify="right")
    about = list(reports.values())[-1].about
    for label, found in digital_rows(about["base_metrics"], about["control_metrics"]).items():
        table.add_row(label, *[f"{found['accuracy']:.1f}"] * len(TIMES))
    for label, report in reports.items():
        cells = [report.statistic("accuracy", t) for t in TIMES]
        table.add_row(label, *(cell.shown(1) for cell in cells))
    console.print(table)
    say(f"Plot, report and checkpoint: {folder}/robustness.png, report.md, report.json, checkpoint/")
