"""``hf-reram inspect``."""

from dataclasses import asdict
from typing import Annotated

import typer

from ..calibration.settle import calibrate
from ..device.temperature import parse_temperature
from ..device.time import format_time, parse_time
from ..evaluation.escape import one_line
from ..evaluation.inspect import LayerReport, inspect_layers
from ..hub.about import task_of
from ..model.find import crossbar_state
from ..model.summary import summarize
from ..tasks.flags import label_names_of
from ..tasks.registry import SPLIT, load_task
from .model import patched
from .output import say, show_json, show_table


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or folder, of a robust checkpoint or a plain one.")],
    time: Annotated[str, typer.Option(help="Since programming.")] = "10y",
    temperature: Annotated[str | None, typer.Option(help="K, or such as 85C; default the config's.")] = None,
    device: Annotated[str | None, typer.Option(help="Cells of a plain checkpoint: preset or JSON file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Weigh errors with the layers' inputs on these data.")] = None,
    task: Annotated[str | None, typer.Option(help="Of the data; default by the model.")] = None,
    split: Annotated[str | None, typer.Option(help=f"Of a data set on the Hub; default {SPLIT}.")] = None,
    label_names: Annotated[
        list[str] | None,
        typer.Option(help="The model's names for the data's, such as neg=NEGATIVE,pos=POSITIVE; default the same."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many examples of the data.")] = 64,
    top: Annotated[int | None, typer.Option(min=1, help="Only so many layers, the worst ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Layer by layer: array, tiles, cells, input range, b, noise-to-signal ratio at a time and the share of each source
    of error, the worst first."""
    if dataset is None and (task is not None or split is not None or label_names):
        raise ValueError("--task, --split and --label-names: allowed are they with --dataset")
    found, fresh = patched(model, device, headless=True)
    work = None
    if dataset is not None:
        work = load_task(
            task or task_of(found), found, model, dataset, split, samples, label_names=label_names_of(label_names)
        )
        if fresh:
            calibrate(found, work.batches)
    heat = None if temperature is None else parse_temperature(temperature)
    layers = inspect_layers(found, time, heat, work.batches if work else None)[:top]
    config = crossbar_state(found).config
    kelvin = heat or config.kelvin
    unmeasured = list(config.device.unmeasured(time, kelvin).values())
    if as_json:
        summary = asdict(summarize(found))
        show_json(
            {
                "model": model,
                "device": config.device.name,
                "time": parse_time(time),
                "temperature": kelvin,
                "unmeasured": unmeasured,
                "noise_to_signal": "of outputs" if work else "of weights",
                "summary": summary,
                "config": config.to_dict(),
                "layers": [{**asdict(layer), "shares": layer.shares} for layer in layers],
            }
        )
        return
    rows = [
        [
            layer.name,
            layer.kind,
            f"{layer.rows} x {layer.columns}",
            f"{layer.tiles}",
            f"{layer.cells:,}",
            _range(layer),
            f"{layer.b:.3f}",
            f"{100 * layer.clipped:.1f} %",
            "–" if layer.noise_to_signal is None else f"{layer.noise_to_signal:.2e}",
            ", ".join(f"{source} {100 * share:.0f} %" for source, share in layer.shares.items() if share) or "–",
        ]
        for layer in layers
    ]
    of = "outputs" if work else "weights"
    head = ["layer", "class", "array", "tiles", "cells", "input range", "b", "clipped"]
    head += [f"noise-to-signal of {of}", "shares of errors"]
    show_table(f"{model}, {format_time(parse_time(time))} after programming at {kelvin:g} K", head, rows)
    for told in unmeasured:
        say(told)
    say(one_line(str(summarize(found))))
    if work is None:
        say("without --dataset: nothing tells what read noise and ADC do")
    elif any({"read noise", "ADC"} & layer.sources.keys() for layer in layers):
        say("noise-to-signal is that of the cells; read noise and ADC come on top, each in its share of all errors")
    if any(layer.centered for layer in layers):
        say("◦ centered: the inputs' mean is subtracted digitally")


def _range(layer: LayerReport) -> str:
    found = "–" if layer.input_range is None else f"{layer.input_range:.3g}"
    if layer.range_kind != "static":
        kind = layer.range_kind.replace("_", " ")
        found = kind if layer.input_range is None else f"{found} {kind}"
    return f"{found} ◦" if layer.centered else found
