"""``hf-reram eval``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..calibration.settle import calibrate
from ..device.time import format_time
from ..evaluation.escape import one_line
from ..evaluation.files import write_whole
from ..evaluation.report import RobustnessReport
from ..evaluation.robustness import evaluate_robustness, owner_of
from ..evaluation.tables import at_kelvin, over_chips, places
from ..hub.about import about_model, task_of
from ..model.find import crossbar_layers
from ..tasks.flags import label_names_of, mapping_flags
from ..tasks.harness import LMEval
from ..tasks.registry import SPLIT, TASKS, load_lm_eval, load_task
from .model import patched, words
from .output import say, show_json, show_table, writable


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder, of a robust checkpoint or a plain one.")],
    dataset: Annotated[str | None, typer.Option(help="Hub id, parquet, JSON or text file, or image folder.")] = None,
    task: Annotated[str | None, typer.Option(help=f"One of {', '.join(TASKS)}; default by the model.")] = None,
    split: Annotated[str | None, typer.Option(help=f"Of a data set on the Hub; default {SPLIT}.")] = None,
    label_names: Annotated[
        list[str] | None,
        typer.Option(help="The model's names for the data set's, such as neg=NEGATIVE,pos=POSITIVE; default the same."),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness in place of a data set, as arc_easy,hellaswag."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files for --lm-eval.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Of --lm-eval; default as its tasks say.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many examples, drawn by --seed; of --lm-eval the first of each task. Default all."
        ),
    ] = None,
    times: Annotated[list[str] | None, typer.Option(help="Since programming, such as 1s,1d,10y.")] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="K, or such as 85C; several one by one.")] = None,
    chips: Annotated[int, typer.Option(min=1, help="Chips, each with its own programming.")] = 10,
    device: Annotated[str | None, typer.Option(help="Cells of a plain checkpoint: preset or JSON file.")] = None,
    range_shrink: Annotated[str | None, typer.Option(help="auto, or a number in (0, 1].")] = None,
    weight_clip: Annotated[str | None, typer.Option(help="auto, none, or RMS multiples.")] = None,
    input_range: Annotated[str | None, typer.Option(help="static, per_token, or auto.")] = None,
    redundancy: Annotated[
        float | None, typer.Option(min=0, max=4, help="Share of cells on top, where they do most.")
    ] = None,
    allow_uncalled: Annotated[
        bool, typer.Option("--allow-uncalled", help="Also where crossbar layers, as of experts, never ran; names them.")
    ] = False,
    conductances: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of hf-reram export, with what was read back from an array; several one by one."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples drawn.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for report, table and plot.")] = Path("reram-eval"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """How a checkpoint does as chips that age: a table, a JSON report and a plot.

    A plain checkpoint is put on the cells of --device and calibrated for --times on the evaluated inputs, without their
    labels; so is a robust one where --device, --range-shrink, --weight-clip, --input-range or --redundancy differ from
    its own, which it keeps where they are not given. An evaluation that was interrupted goes on where it stopped, with
    the same --batch-size: read noise is drawn for each batch. Arrays of --conductances are evaluated beside the chips.
    """
    spoken, tasks = words(times, "--times") or ["1s", "1d", "10y"], words(lm_eval, "--lm-eval")
    if bool(tasks) == (dataset is not None):
        raise ValueError(f"--dataset {dataset} and --lm-eval {','.join(tasks) or None}: allowed is one of them")
    for option, given in (("--task", task), ("--split", split), ("--label-names", " ".join(label_names or ()) or None)):
        if tasks and given is not None:
            raise ValueError(f"{option} {given} with --lm-eval: allowed is {option} with --dataset")
    told = label_names_of(label_names)
    if not tasks and (include_path is not None or num_fewshot is not None):
        raise ValueError("--include-path and --num-fewshot: allowed are they with --lm-eval")
    writable(output)
    found, fresh = patched(model, device, spoken, **mapping_flags(range_shrink, weight_clip, redundancy, input_range))
    kind = task or task_of(found)
    if tasks:
        work = load_lm_eval(found, model, tasks, include_path, num_fewshot, samples, batch_size)
    else:
        assert dataset is not None
        work = load_task(kind, found, model, dataset, split, samples, batch_size, seed, told)
    calibrated = "calibrated on the evaluated inputs"
    if fresh:
        layers = crossbar_layers(found)
        without = [name for name, layer in layers.items() if not layer.calibrated]
        if len(without) < len(layers):
            calibrated = f"all layers {calibrated}, since these had no numbers of calibration: {', '.join(without)}"
        calibrate(found, work.batches)
    key = [kind, work.content, batch_size]  # on which the read noise depends that a chip meets
    report = evaluate_robustness(
        found,
        work.evaluate,
        spoken,
        temperature or (None,),
        chips,
        progress=not as_json,
        resume=output / f"chips-{owner_of(found, key)[:12]}.jsonl",
        key=key,
        allow_uncalled=allow_uncalled,
        conductances=conductances,
    )
    metrics = work.evaluate.shown(report.metrics) if isinstance(work.evaluate, LMEval) else [work.metric]
    local = dataset is not None and Path(dataset).exists()
    report.about = replace(
        about_model(found, report),
        task=kind,
        metric=metrics[0],
        dataset=f"lm-eval: {', '.join(tasks)}" if dataset is None else Path(dataset).name if local else dataset,
        dataset_split="" if tasks or local else split or SPLIT,
        base_model=model if not Path(model).exists() else Path(model).resolve().name,
        examples=work.examples,
    ).to_dict()
    if fresh:
        report.notes.append(calibrated)
    report.to_json(output / "robustness.json")
    write_whole(output / "robustness.md", report.to_markdown())
    report.plot(output / "robustness.png", metric=metrics[0], title=f"{model} on {report.config['device']['name']}")
    if as_json:
        show_json(report.to_dict())
        return
    for metric in metrics:
        _show(report, metric)
    say(one_line(report.summary))
    if report.arrays:
        say(f"- {one_line(report.array_sentence())}")
    for note in report.notes:
        say(f"- {one_line(note)}")
    if report.uncalled:
        silent = one_line(", ".join(report.uncalled))
        say(f"- crossbar layers that were not called, and so were no chip: {silent}")
    say(f"Report, table and plot: {output}/robustness.json, robustness.md, robustness.png")


def _show(report: RobustnessReport, metric: str) -> None:
    rows: list[list[str]] = []
    n, cells = places(m.metrics[metric] for m in report.measurements if metric in m.metrics), {}
    for name, reference in (("digital", report.digital), ("ideal crossbar", report.ideal)):
        assert reference is not None
        rows.append([name, "", f"{reference[metric]:.{n}f}" if metric in reference else "–", ""])
    for kelvin in report.temperatures:
        for time in report.times:
            s, when = report.found(metric, time, kelvin), f"after {format_time(time)}"
            cells[f"{when}{at_kelvin(kelvin)}"] = s
            heat = "" if kelvin is None else f"{kelvin:g} K"
            rows.append([when, heat, s.shown(n), f"± {s.ci95:.{n}f}" if s.chips > 1 else "–"])
    show_table(f"{metric}, {over_chips(cells)}", ["", "temperature", "mean ± std", "95 % of the mean"], rows)
    if report.arrays:
        arrays = [[str(a), f"{a.metrics[metric]:.{n}f}" if metric in a.metrics else "–"] for a in report.arrays]
        show_table(f"{metric} on conductances that were read", ["", "single array"], arrays)
