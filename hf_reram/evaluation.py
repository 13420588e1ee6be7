"""How a model does as chips that age: one number per metric, time, temperature and chip, with its references."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .deployment import deploy, digital
from .device.time import parse_time
from .patching import crossbar_state, summarize
from .report import Measurement, RobustnessReport

DEFAULT_TIMES = ("1s", "1d", "10y")


def evaluate_robustness(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Mapping[str, float] | float],
    times: Sequence[str | float] = DEFAULT_TIMES,
    temperatures: Sequence[float | None] = (None,),
    seeds: int | Iterable[int] = 10,
    references: bool = True,
    progress: bool = True,
) -> RobustnessReport:
    """Evaluate a patched model as several chips at several times since programming.

    Args:
        model: patched and calibrated.
        evaluate: called with the model, returns metrics by name, or one number. It runs once per chip, time and
            temperature, and once for each reference.
        times: see :func:`hf_reram.deploy`.
        temperatures: K; None takes the config's.
        seeds: how many chips, or the chips' numbers. Chip ``n`` is the same chip at every time.
        references: also evaluate the digital model and the ideal crossbar (I-V curve and converters, nothing else).
        progress: show a progress bar.

    Raises:
        ValueError: the model is not patched; no times, temperatures or seeds; a bad one of them; or ``evaluate``
            returns no finite numbers.
    """
    state = crossbar_state(model)
    chips = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    for name, values in (("times", times), ("temperatures", temperatures), ("seeds", chips)):
        if isinstance(values, (str, bytes)) or not len(values):
            raise ValueError(f"{name}={values!r}: allowed is a non-empty list")
    seconds = [parse_time(t) for t in times]
    kelvins = [state.config.temperature if t is None else t for t in temperatures]
    for kelvin in kelvins:
        state.config.device.equivalent_time(0.0, kelvin)
    contexts: list[tuple[str, Any]] = []
    if references:
        contexts += [("digital", digital(model)), ("ideal", nullcontext())]
    measurements: list[Measurement] = []
    found: dict[str, dict[str, float]] = {}
    total = len(contexts) + len(kelvins) * len(seconds) * len(chips)
    with tqdm(total=total, desc="chips", disable=not progress, unit="run") as bar, warnings.catch_warnings():
        warnings.simplefilter("once")
        for name, context in contexts:
            with context:
                found[name] = _metrics(evaluate(model))
            bar.update()
        for kelvin in kelvins:
            for second in seconds:
                for chip in chips:
                    with deploy(model, second, kelvin, chip):
                        measurements.append(Measurement(second, kelvin, chip, _metrics(evaluate(model))))
                    bar.update()
    device = state.config.device
    notes = [
        f"retention at {time:g} s is the last measured value, held"
        for time, kelvin in sorted({(t, k) for t in seconds for k in kelvins}, key=str)
        if device.holds_at(time, kelvin)
    ]
    if device.assumed:
        notes.append(f"assumed, not measured: {', '.join(device.assumed)}")
    return RobustnessReport(
        measurements=measurements,
        digital=found.get("digital"),
        ideal=found.get("ideal"),
        config=state.config.to_dict(),
        summary=str(summarize(model)),
        notes=notes,
    )


def _metrics(result) -> dict[str, float]:
    items = result.items() if isinstance(result, Mapping) else [("metric", result)]
    metrics = {}
    for key, value in items:
        try:
            metrics[str(key)] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"evaluate returned {key}={value!r}: allowed are numbers") from None
        if not math.isfinite(metrics[str(key)]):
            raise ValueError(f"evaluate returned {key}={value!r}: allowed are finite numbers")
    if not metrics:
        raise ValueError("evaluate returned no metrics")
    return metrics
