"""The model card of a robust checkpoint, made from its robustness report alone."""

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..config import ReRAMConfig
from ..device.retention import retention_to_dict
from ..device.time import format_time, parse_time
from ..evaluation.escape import code_block, code_span, escaped, python_text
from ..evaluation.report import RobustnessReport
from ..evaluation.tables import (
    at_kelvin,
    comparison_cells,
    comparison_table,
    metrics_cells,
    metrics_table,
    over_chips,
    over_fewer,
    places,
    same_temperature,
)
from .about import AUTO_CLASSES, About

BEGIN = "<!-- hf_reram writes what stands between this line and its end mark; text above and below is kept -->"
END = "<!-- end of what hf_reram writes -->"
UNMEASURED = "Its robustness has not been measured, or not with these weights."
TAGS = ("reram", "in-memory-computing", "analog")


def model_card(
    report: RobustnessReport,
    comparison: Mapping[str, RobustnessReport] | None = None,
    plot: str | None = "robustness.png",
    configs: Sequence[ReRAMConfig] | None = None,
) -> ModelCard:
    """The card of the model that ``report`` was measured on.

    Args:
        report: with :attr:`~RobustnessReport.about`; without measurements the card says that there are none.
        comparison: reports by label, for the table; None: the model alone.
        plot: where the card finds it; None shows none.
        configs: of the model's parts as they are now, whose loss, times and temperature may be others than when it was
            measured; None: as then.

    Raises:
        ValueError: the report says nothing about its model.
    """
    if not report.about:
        raise ValueError("the report's 'about' is empty: a card needs at least what About's required fields say")
    about = About.from_dict(report.about)
    measured_with = report.configs() or [ReRAMConfig.from_dict(report.config)]
    configs = list(configs or measured_with)
    rows = dict(comparison or {about.name: report})
    measured = bool(report.measurements)
    last = report.times[-1] if measured else parse_time(configs[0].retention_times[-1])
    template = resources.files(__package__) / "templates" / "model_card.md"
    return ModelCard.from_template(
        _metadata(about, report),
        template_str=template.read_text(encoding="utf-8"),
        begin=BEGIN,
        end=END,
        name=escaped(about.name),
        base=_link(about.base_model),
        adapter_of=python_text(about.base_model) if about.relation == "adapter" else None,
        trained=_is_trained(about),
        device=escaped(_devices(measured_with)),
        sources=[escaped(source) for source in dict.fromkeys(c.device.source for c in measured_with) if source],
        headline=_headline(about, report),
        auto_class=AUTO_CLASSES.get(about.task, "AutoModel"),
        repo=python_text(about.repo or about.name),
        evaluate=code_span(f"hf-reram eval {shlex.quote(about.repo or about.name)}"),
        last_time=format_time(last),
        kelvin=(kelvin := _snippet_kelvin(report, configs)),
        at_kelvin=at_kelvin(kelvin),
        metric=escaped(about.metric),
        dataset=", ".join(escaped(part) for part in (about.dataset, about.dataset_split) if part),
        examples=about.examples,
        chips=escaped(over_chips(comparison_cells(rows, about.metric), same_temperature(rows))) if measured else "",
        table=comparison_table(rows, about.metric, digital=about.digital).strip() if measured else "",
        details=metrics_table(rows, last, digital=about.digital, metrics=_shown(about, report)).strip()
        if measured and len(report.metrics) > 1
        else "",
        fewer=escaped(over_fewer(metrics_cells(rows, last, _shown(about, report)))),
        plot=plot if measured else None,
        hardware=(hardware := _each_hardware(measured_with)),
        devices=[""] if len(hardware[0][1]) == 1 else [escaped(config.device.name) for config in _each(measured_with)],
        summary=escaped(report.summary),
        training=_training(about, configs),
        command=code_block(about.command, "bash") if about.command else None,
        limits=_limits(report),
    )


def _shown(about: About, report: RobustnessReport) -> list[str]:
    return [name for name in about.details if name in report.metrics] or report.metrics


def _on_hub(name: str) -> bool:
    """Whether it is an id that the Hub allows, with its owner's name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _link(base_model: str) -> str:
    if _on_hub(base_model):
        return f"[{escaped(base_model)}](https://huggingface.co/{base_model})"
    return code_span(base_model)


def _metadata(about: About, report: RobustnessReport) -> ModelCardData:
    device = _devices(report.configs())
    results: list[EvalResult] = []

    def add(metric: str, value: float, when: str) -> None:
        if not math.isfinite(value):
            return
        results.append(
            EvalResult(
                task_type=about.task,
                dataset_type=about.dataset or "unknown",
                dataset_name=about.dataset or "unknown",
                dataset_split=about.dataset_split or None,
                metric_type=metric.lower(),
                metric_name=f"{metric}, {when}",
                metric_value=round(value, 4),
            )
        )

    metrics = [about.metric] if about.metric else []
    for metric in [] if not report.measurements else report.metrics if len(report.metrics) < 4 else metrics:
        for reference, values in (("as a digital model", report.digital), ("ideal crossbar", report.ideal)):
            if values and metric in values:
                add(metric, values[metric], reference)
        for time in report.times:
            found = report.statistic(metric, time)
            chips = "of one chip" if found.chips == 1 else f"mean of {found.chips} chips"
            heat = at_kelvin(report.main_temperature)
            add(metric, found.mean, f"{device} {format_time(time)} after programming{heat}, {chips}")
    hub = _on_hub(about.base_model)
    emissions = None if about.co2_grams is None else {"emissions": about.co2_grams, "training_type": "fine-tuning"}
    return ModelCardData(
        model_name=about.name,
        library_name="hf_reram",
        base_model=about.base_model if hub else None,
        base_model_relation=about.relation if hub else None,
        datasets=[about.dataset] if _on_hub(about.dataset) else None,
        metrics=[metric.lower() for metric in metrics] or None,
        pipeline_tag=about.task or None,
        tags=list(TAGS),
        co2_eq_emissions=emissions,
        eval_results=results or None,
    )


def _headline(about: About, report: RobustnessReport) -> str:
    if not report.measurements:
        return UNMEASURED
    last = report.times[-1]
    found = report.statistic(about.metric, last)
    n = places([found.mean])
    chips = len({m.seed for m in report.measurements if (m.time, m.temperature) == (last, report.main_temperature)})
    on = "one chip" if chips == 1 else "chips" if found.chips == chips else f"{found.chips} of {chips} chips"
    aged = f"{found.shown(n)} on {on} {format_time(last)} after programming{at_kelvin(report.main_temperature)}"
    digital = (("the digital base", about.base_metrics), ("the base finetuned digitally", about.control_metrics))
    others = [f", {metrics[about.metric]:.{n}f} of {words}" for words, metrics in digital if about.metric in metrics]
    return f"{escaped(about.metric)}: {aged}{''.join(others)}."


def _snippet_kelvin(report: RobustnessReport, configs: Sequence[ReRAMConfig]) -> float | None:
    """The temperature [K] that ``deploy`` has to be told for the figures that name none; None where the model takes it
    by itself."""
    if not report.measurements:
        return None
    kelvin = report.main_temperature or report.own_temperature
    return None if {config.kelvin for config in configs} == {kelvin} else kelvin


def _each(configs: Sequence[ReRAMConfig]) -> list[ReRAMConfig]:
    """One config for each hardware."""
    found: list[ReRAMConfig] = []
    for config in configs:
        if all(config.hardware() != other.hardware() for other in found):
            found.append(config)
    return found


def _devices(configs: Sequence[ReRAMConfig]) -> str:
    return " and ".join(dict.fromkeys(config.device.name for config in configs))


def _each_hardware(configs: Sequence[ReRAMConfig]) -> list[tuple[str, list[str]]]:
    """What a table says of the hardware, with a column for each that parts of the model are on."""
    columns = [dict(_hardware(config)) for config in _each(configs)]
    names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    return [(name, [column.get(name, "none") for column in columns]) for name in names]


def _hardware(config: ReRAMConfig) -> list[tuple[str, str]]:
    device = config.device
    shrink = config.range_shrink if isinstance(config.range_shrink, str) else f"{config.range_shrink:g}"
    retention = retention_to_dict(device.retention)
    return [
        ("conductance", f"{device.g_min:g}–{device.g_max:g} µS, differential pairs"),
        ("I–V curve", f"I = g v0 sinh(v / v0), v0 = {device.v0:g} V"),
        ("read voltage", f"{device.read_voltage:g} V, b = {device.b():.3g} unshrunk; range_shrink = {shrink}"),
        ("retention model", str(retention["type"])),
        ("programming error", f"{_polynomial(device.programming)} µS"),
        ("read noise", f"{device.read_noise:g} µA a column and read"),
        ("converters", f"DAC {_bits(config.dac_bits)}, ADC {_bits(config.adc_bits)}"),
        *([("redundancy", _redundancy(config))] if config.redundancy else []),
        ("assumed, not measured", ", ".join(device.assumed) or "nothing"),
    ]


def _redundancy(config: ReRAMConfig) -> str:
    return f"{100 * config.redundancy:g} % more cells, where they do most"


def _polynomial(coefficients: Sequence[float]) -> str:
    powers = ("", " g", *(f" g^{k}" for k in range(2, len(coefficients))))
    return " + ".join(f"{c:g}{power}" for c, power in zip(coefficients, powers))


def _bits(bits: int | None) -> str:
    return f"{bits} bits" if bits else "ideal"


def _is_trained(about: About) -> bool:
    """Whether anything tells of a training: a model may be mapped and calibrated alone."""
    return bool(about.training) or about.label_free or about.co2_grams is not None


def _training(about: About, configs: Sequence[ReRAMConfig]) -> list[str]:
    lines = list(dict.fromkeys(map(_loss if _is_trained(about) else _mapped, configs)))
    lines += ["without labels: on the digital base's predictions"] if about.label_free else []
    lines += [escaped(line) for line in about.training]
    lines += [f"{about.co2_grams:g} g CO₂eq"] if about.co2_grams is not None else []
    if about.versions:
        made = ", ".join(f"{name} {version}" for name, version in about.versions.items())
        lines.append(escaped(f"{about.date}, {made}" if about.date else made))
    return lines


def _loss(config: ReRAMConfig) -> str:
    return f"retention loss “{config.retention_loss}”, {_mapped_for(config)}"


def _mapped(config: ReRAMConfig) -> str:
    return f"none is known of; mapped {_mapped_for(config)}"


def _mapped_for(config: ReRAMConfig) -> str:
    times = ", ".join(format_time(parse_time(t)) for t in config.retention_times)
    return f"for {times} at {config.kelvin:g} K"


def _limits(report: RobustnessReport) -> list[str]:
    lines = [
        "Simulated, not measured on silicon: IR drop, sneak paths, drift of the periphery and endurance are not "
        "modelled.",
        "The figures hold for this device, these times and this evaluation; what the base model cannot do or gets "
        "wrong, this one cannot do either.",
    ]
    if report.uncalled:
        silent = escaped(", ".join(report.uncalled))
        lines.append(f"Crossbar layers that were not called, and so were no chip: {silent}.")
    for array in report.arrays:
        found = ", ".join(f"{name} {value:.{places([value])}f}" for name, value in array.metrics.items())
        lines.append(escaped(f"On the {array}, no simulated chip and no part of the figures above: {found}."))
    lines += [escaped(report.array_sentence())] if report.arrays else []
    return lines + [escaped(sentence) for sentence in report.sentences()]
