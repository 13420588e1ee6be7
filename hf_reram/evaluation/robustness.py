"""How a model does as chips that age: one number per metric, time, temperature and chip, with its references."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.checks import shown
from ..device.seeds import checked_seed, derived_seed
from ..device.temperature import is_room, parse_temperature
from ..device.time import parse_time
from ..model.array_files import ORIGINS
from ..model.deploy import deploy, digital, refuse_modes, uncalibrated
from ..model.digest import model_digest, settings_of, untold_in, values_of, weights_digest
from ..model.find import (
    calls_around,
    crossbar_layers,
    crossbar_states,
    is_compiled,
    ran_around,
    replaced,
    reset_calls,
    uncalled,
)
from ..model.finite import refuse_not_finite
from ..model.inputs import evaluating, forked_rng
from ..model.read_back import ReadBack
from ..model.reads import WeightReads
from ..model.sharding import alike, is_first, is_sharded, of_each, of_first, processes, talks
from ..model.summary import summarize
from ..nn.clipping import clipped_beyond_choice, far_below_scale, in_words, warn_clipped
from .content import key_of
from .report import ArrayMeasurement, Measurement, RobustnessReport
from .run_log import Run, RunLog

logger = logging.get_logger(__name__)

DEFAULT_TIMES = ("1s", "1d", "10y")


def evaluate_robustness(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Mapping[str, float] | float],
    times: Sequence[str | float] = DEFAULT_TIMES,
    temperatures: Sequence[str | float | None] = (None,),
    seeds: int | Iterable[int] = 10,
    references: bool = True,
    progress: bool = True,
    resume: str | Path | None = None,
    key: Any = None,
    share_chips: bool = False,
    allow_uncalled: bool = False,
    together: bool = False,
    conductances: str | Path | Iterable[str | Path] | None = None,
) -> RobustnessReport:
    """Evaluate a patched model as several chips at several times since programming.

    Args:
        model: patched and calibrated.
        evaluate: called with the model in evaluation mode, returns metrics by name, or one number. It runs once per
            chip, time and temperature, and once for each reference.
        times: see :func:`hf_reram.deploy`; equal ones count once.
        temperatures: K, or texts such as "85C"; None takes what :func:`hf_reram.deploy` takes by itself: the config's
            ``temperature``, or the device's reference where that is None. Equal ones count once. The report notes None
            for the reference.
        seeds: how many chips, or the chips' numbers, each once. Chip ``n`` is the same chip at every time, and its
            read noise the same in every evaluation, whatever else is evaluated beside it; compiled code draws another
            of the same spread.
        references: also evaluate the digital model and the ideal crossbar (I-V curve and converters, nothing else).
        progress: show a progress bar.
        resume: a file that keeps each finished run; those of the same weights, configs (the model's own too) and
            ``key`` are not run again, unless another version of hf_reram, torch, transformers or Python ran them.
        key: for ``resume``, what ``evaluate`` depends on beside the model, such as its data set, split, samples and
            seed: any JSON value. None: a fingerprint of ``evaluate``, its code with all that it names and holds, and
            what is in files and folders that these name with a slash or an ending, but for folders that hold
            ``resume``. Environment variables that it reads are not seen, nor how far random generators are, nor files
            whose names its code puts together or finds, as with ``os.path.join`` or ``glob``, nor modules that it
            imports by such a name, nor what a text that it evaluates reads: name them in a key. One that changes
            something of these while it runs, as a counter or a meter that it fills, is then resumed only in a new
            process, where all is as before its first run; with a key in the same one, too. One that writes a file that
            it names is resumed with a key alone.
        share_chips: with several processes, each runs its share of the chips, and all get the whole report;
            ``evaluate`` must then not talk to other processes. Where each forward does (weights sharded by FSDP2, a
            model wrapped by DDP), all run every chip ``together``.
        allow_uncalled: report also where some crossbar layers never ran in an evaluation, as experts that no token was
            routed to; the report, its table and the card then name them. Such layers were no chip.
        together: with several processes, all run every chip, as where ``evaluate`` gathers from all of them; always
            where each forward talks. What is run, resumed and reported is then what the first process says.
        conductances: a folder, or several, of :func:`hf_reram.export_conductances`, with what was read back from an
            array in each; see :func:`hf_reram.deploy`. The model is evaluated on each of them too, once, and reported
            beside the chips, as no chip: the report's ``arrays`` say which were measured.

    Raises:
        RuntimeError: crossbar layers did not run on their cells in an evaluation, or are none any more, and
            ``allow_uncalled`` is False; names them. Or ``evaluate`` deploys the model itself, changes its weights or
            config, or runs crossbar layers around it. Or the evaluation failed in another of the processes that share
            chips or evaluate together.
        ValueError: the model is not patched; weights are NaN or infinite, which are named; no times, temperatures or
            seeds; a bad one of them; ``evaluate`` returns no numbers; ``resume`` holds runs of other weights, another
            config or evaluation; nothing tells ``evaluate``, or what modules hold, from another one, and there is no
            ``key``; a key that is no JSON value; both ``share_chips`` and ``together``; or a folder of conductances is
            another model's, or no array's, see :func:`hf_reram.deploy`, or given twice.
        OSError: no such folder of conductances.
    """
    states = crossbar_states(model)
    state = states[0]
    chips = _chips(seeds)
    for name, values in (("times", times), ("temperatures", temperatures), ("seeds", chips)):
        if isinstance(values, (str, bytes)) or not isinstance(values, Sized) or not len(values):
            raise ValueError(f"{name}={values!r}: allowed is a non-empty list")
    if share_chips and together:
        raise ValueError("share_chips=True and together=True: allowed is one of them")
    refuse_modes(model, "evaluate its robustness")
    if not callable(evaluate):
        raise ValueError(f"evaluate={evaluate!r}: allowed is a function of the model")
    seconds = list(dict.fromkeys(parse_time(t) for t in times))
    kelvins = list(dict.fromkeys(_noted(t, [part.config for part in states]) for t in temperatures))
    for kelvin in kelvins:
        for part in states:
            part.config.device.equivalent_time(0.0, part.config.temperature if kelvin is None else kelvin)
    runs = [Run("digital"), Run("ideal")] if references else []
    runs += [Run("chip", s, k, chip) for k in kelvins for s in seconds for chip in chips]
    several = processes() > 1
    together = several and (together or talks(model))
    shares = several and share_chips and not together
    with alike(together or shares):
        refuse_not_finite(model)
        arrays = _arrays(model, () if conductances is None else conductances)
    runs += arrays
    weights, settings, configs = weights_digest(model), settings_of(model), [part.config.to_dict() for part in states]
    file = resume if not together or is_first() else None
    with alike(together or shares):
        if file is not None and key is None:
            refuse_untold(settings)
            key = key_of("evaluation", evaluate, model, file)
        if file is not None and (around := _autocasts(model)):
            key = {**(key if isinstance(key, Mapping) else {"key": key}), "autocast": around}
    told = of_first(key) if shares else None  # a function that holds its process's device has another key in each
    key = key if told is None else told
    with alike(together or shares):
        log: RunLog | None = None
        if file is not None:
            owner, parts = owner_of(model, key, weights, settings), parts_of(model, key, weights, settings)
            log = RunLog(file, owner, parts, values_of(settings))
        found: dict[Run, dict[str, float]] = log.read() if log else {}
    warn_clipped(crossbar_layers(model).values())
    silent: set[str] = set(log.uncalled) if log else set()
    notes: set[str] = set(log.notes) if log else set()
    if together or shares:
        runs, found, silent, notes = of_first((runs, found, silent, notes))
    pending = [run for run in runs if run not in found]
    mine = pending[dist.get_rank() :: processes()] if shares else pending
    hidden, differs = not progress or (together and not is_first()), False
    with alike(shares), tqdm(total=len(mine), desc="chips", disable=hidden, unit="run") as bar:
        for run in mine:
            with alike(together):
                watched = run.kind == "chip" and run == next(each for each in mine if each.kind == "chip")
                array = arrays[run] if run.conductances else None
                found[run], missed, other, noted = _measure(model, evaluate, run, together, watched, array)
                if missed and not allow_uncalled:
                    raise RuntimeError(_complaint(model, missed))
                _refuse_other(states, configs)
                if run.kind != "chip" and array is None:  # deploy looks by itself
                    _refuse_changed(model, weights)
                if log:
                    log.append(run, found[run], missed, noted)
            silent |= set(missed)
            notes |= set(noted)
            differs |= other
            bar.update()
    if shares:
        for runs_of, silent_of, notes_of in of_each(({run: found[run] for run in mine}, silent, notes)):
            found |= runs_of
            silent |= silent_of
            notes |= notes_of
    if silent and not allow_uncalled:  # in a log from before
        raise RuntimeError(_complaint(model, silent))
    _refuse_changed(model, weights)
    report = RobustnessReport(
        measurements=[
            Measurement(run.time, run.temperature, run.seed, found[run]) for run in runs if run.kind == "chip"
        ],
        digital=found[Run("digital")] if Run("digital") in runs else None,
        ideal=found[Run("ideal")] if Run("ideal") in runs else None,
        config=state.config.to_dict(),
        other_configs=[part.config.to_dict() for part in states[1:]],
        summary=str(summarize(model)),
        notes=_notes(model, seconds, kelvins),
        weights=weights,
        model_config=settings,
        uncalled=[name for name in [*crossbar_layers(model), *replaced(model)] if name in silent],
        arrays=[
            ArrayMeasurement(array.name, array.origin, array.time, array.temperature, run.conductances, found[run])
            for run, array in arrays.items()
        ],
    )
    report.notes += sorted(notes)
    if differs:
        report.notes.append("processes measured different figures in the same evaluation: these are the first one's")
        logger.warning("%s", report.notes[-1])
    before, now = settings["attributes"], settings_of(model)["attributes"]
    if changed := [name for name in before if before[name] != now.get(name)]:  # counters and caches, or evaluate's
        report.notes.append(f"attributes of modules changed while the model was evaluated: {', '.join(changed)}")
        settings["attributes"] = {name: value for name, value in before.items() if name not in changed}
    if untold := untold_in(settings):
        report.notes.append(f"nothing tells from others what modules hold as {', '.join(untold)}")
    report.notes += (missing := report.left_out())
    for note in missing:
        logger.warning("%s: it is no part of the means", note)
    state.report = report  # for push_to_hub
    return report


def key_text(key: Any) -> str:
    """A key as text.

    Raises:
        ValueError: it is no JSON value.
    """
    try:
        return json.dumps(key, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key={key!r}: allowed is a JSON value: {error}") from None


def refuse_untold(settings: dict[str, Any]) -> None:
    """
    Args:
        settings: of a model.

    Raises:
        ValueError: its modules hold what nothing tells from others; names it.
    """
    if untold := untold_in(settings):
        raise ValueError(
            f"the model cannot be told from another one by what its modules hold as {', '.join(untold)}: say with "
            "key=... what is evaluated, this too"
        )


def owner_of(model: nn.Module, key: Any, weights: str | None = None, settings: dict[str, Any] | None = None) -> str:
    """A fingerprint of the model, its config, and a JSON value that says what is measured.

    Args:
        weights: the digest of the model's, and settings: :func:`.digest.settings_of` it, where they are known.

    Raises:
        ValueError: ``key`` is no JSON value.
    """
    return hashlib.sha256(f"{model_digest(model, weights, settings)} {key_text(key)}".encode()).hexdigest()


def parts_of(model: nn.Module, key: Any, weights: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Short fingerprints of what :func:`owner_of` is one of: a key that is an object, and the attributes of the
    modules, count by their names."""
    parts = {str(name): value for name, value in key.items()} if isinstance(key, Mapping) else {"key": key}
    parts |= {"weights": weights, "ReRAMConfig": [state.config.to_dict() for state in crossbar_states(model)]}
    parts |= {f"attributes.{name}": value for name, value in settings["attributes"].items()}
    parts["model.config"] = {name: value for name, value in settings.items() if name != "attributes"}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in parts.items() if value is not None}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


def _autocasts(model: nn.Module) -> list[str]:
    """What autocast is on for around an evaluation, on the model's devices."""
    kinds = sorted({p.device.type for p in model.parameters()})
    on = [kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
    return [f"{kind} {torch.get_autocast_dtype(kind)}" for kind in on]


def _refuse_changed(model: nn.Module, weights: str) -> None:
    if weights_digest(model) != weights:
        raise RuntimeError(
            "the model's weights or numbers of calibration changed while it was evaluated, so that the figures are of "
            "several models: have evaluate leave them as they are"
        )


def _refuse_other(states: Sequence[Any], configs: Sequence[dict[str, Any]]) -> None:
    if [state.config.to_dict() for state in states] != configs:
        raise RuntimeError(
            "the model's ReRAMConfig changed while it was evaluated, so that the figures are of several: have evaluate "
            "leave it as it is"
        )


def _notes(model: nn.Module, seconds: list[float], kelvins: list[float | None]) -> list[str]:
    """What a reader of the numbers has to know of the devices."""
    states = crossbar_states(model)
    notes = []
    for what, names in uncalibrated(model).items():
        notes.append(
            f"{len(names)} of {len(crossbar_layers(model))} crossbar layers are not calibrated, {what}: "
            f"{', '.join(names)}"
        )
    if newer := [
        f"{name} ({layer.outputs - layer.calibrated_outputs} of {layer.outputs})"
        for name, layer in crossbar_layers(model).items()
        if layer.calibrated_outputs is not None
    ]:
        notes.append(f"outputs that are newer than their layers' calibration are not calibrated: {', '.join(newer)}")
    layers = crossbar_layers(model).values()
    for misfit in in_words(clipped_beyond_choice(layers), far_below_scale(layers)):
        notes.append(f"of weights that changed after calibration {misfit}")
    for part in states:
        device, of = part.config.device, f" ({part.config.device.name})" if len(states) > 1 else ""
        heats = [part.config.temperature if kelvin is None else kelvin for kelvin in kelvins]
        named = heats if len(heats) == 1 else [device.reference_temperature if k is None else k for k in heats]
        told = [device.unmeasured(time, kelvin) for kelvin in named for time in sorted(seconds)]
        notes += [f"{each}{of}" for each in dict.fromkeys(each for one in told for each in one.values())]
        if None in heats and not is_room(device.reference_temperature):
            notes.append(f"without another temperature cells are at {device.reference_temperature:g} K{of}")
        if device.assumed:
            notes.append(f"assumed, not measured: {', '.join(device.assumed)}{of}")
    if len(states) > 1:
        notes.append(f"parts of the model are on devices of their own: {_devices(model)}")
    return notes


def _noted(temperature: str | float | None, configs: Sequence[ReRAMConfig]) -> float | None:
    """A temperature as a report notes it [K]: None is what ``deploy`` takes by itself where that is the reference, or
    another one for each part."""
    own = {config.kelvin for config in configs}
    kelvin = parse_temperature(temperature) if temperature is not None else own.pop() if len(own) == 1 else None
    plain = {config.kelvin for config in configs} | {config.device.reference_temperature for config in configs}
    return None if plain == {kelvin} else kelvin


def _chips(seeds: int | Iterable[int]) -> list[int]:
    """The chips' numbers."""
    try:
        if isinstance(seeds, (str, bytes)):
            raise ValueError
        found = [checked_seed(n) for n in (seeds if isinstance(seeds, Iterable) else range(checked_seed(seeds)))]
    except ValueError:
        raise ValueError(
            f"seeds={seeds!r}: allowed are a number of chips or their numbers, integers from 0 to 2^63 - 1"
        ) from None
    if len(set(found)) < len(found):
        raise ValueError(f"seeds={shown(found)} names a chip twice, which is the same chip: allowed is each once")
    return found


def _arrays(model: nn.Module, folders: str | Path | Iterable[str | Path]) -> dict[Run, ReadBack]:
    """Folders of conductances, looked at, by their run.

    Raises:
        ValueError: see :class:`ReadBack`; or two hold the same. OSError: no such folder.
    """
    found: dict[Run, ReadBack] = {}
    for folder in [folders] if isinstance(folders, (str, Path)) else folders:
        array = ReadBack.of(model, folder)
        run = Run(ORIGINS[array.origin], array.time or 0.0, array.temperature, 0, array.digest(model))
        if same := [other.folder for one, other in found.items() if one.conductances == run.conductances]:
            raise ValueError(
                f"conductances: {same[0]} and {array.folder} hold the same, which would count as two arrays: "
                "allowed is each once"
            )
        found[run] = array
    return found


def _complaint(model: nn.Module, names: Iterable[str]) -> str:
    names = sorted(names)
    count = len(crossbar_layers(model)) + len(replaced(model))
    return (
        f"{len(names)} of {count} crossbar layers were not called in an evaluation, or not on their cells, so that its "
        f"numbers are not a chip's there: {', '.join(names)}. Keep them digital (modules_to_not_convert), or have them "
        "named in the report (allow_uncalled=True, in a command --allow-uncalled)"
    )


def _devices(model: nn.Module) -> str:
    """Which layers are on which device, by the first part of their names."""
    found: dict[str, set[str]] = {}
    for name, layer in crossbar_layers(model).items():
        found.setdefault(layer.crossbar.config.device.name, set()).add(name.partition(".")[0])
    return "; ".join(f"{device}: {', '.join(sorted(parts))}" for device, parts in found.items())


def _measure(
    model: nn.Module, evaluate: Callable, run: Run, together: bool, watched: bool, array: ReadBack | None = None
) -> tuple[dict[str, float], list[str], bool, list[str]]:
    """The metrics, the crossbar layers that were not called for them, whether processes that evaluate ``together``
    found different ones, in which case they are the first one's, and what a reader of the metrics has to know.

    Args:
        watched: look who computes with the weights of crossbars. array: on whose cells, in place of a chip's.
    """
    context: Any = digital(model) if run.kind == "digital" else nullcontext()
    if array is not None:
        context = deploy(model, conductances=array)
    elif run.kind == "chip":
        context = deploy(model, run.time, run.temperature, run.seed)
    states = crossbar_states(model)
    blind = is_compiled(model) or any(state.compiled for state in states) or is_sharded(model)
    reads = WeightReads(model) if watched and not blind else nullcontext()
    with context, evaluating(model), forked_rng(model):
        torch.manual_seed(derived_seed(run.seed, f"read noise at {run.time:g} s, {run.temperature} K"))
        reset_calls(model)
        before, beside = [state.deployments for state in states], calls_around(model)
        for state in states:
            state.autocasts = set()
        with alike(together):
            with reads:
                metrics = numbers_of(evaluate(model))
            if [state.deployments for state in states] != before:
                raise RuntimeError(
                    "evaluate deployed the model as a chip of its own, so that its numbers are not those of the chip "
                    "that is evaluated: let it call the model as it is given"
                )
            if ran := ran_around(model, beside):
                raise RuntimeError(
                    f"evaluate ran crossbar layers around the model that it was given, which are no chip: "
                    f"{', '.join(ran)}: evaluate the whole model, or have evaluate call what it is given alone"
                )
        missed = uncalled(model, digitally=run.kind == "digital")
        noted = _noted_of(model, run, reads.found if isinstance(reads, WeightReads) else {})
        if array is not None:
            noted += array.notes()
        if not together:
            return metrics, missed, False, noted
        every = of_each((metrics, missed, noted))  # which may each have had a part of the data
        first = every[0][0]
        silent = [name for name in missed if all(name in names for _, names, _ in every)]
        noted = sorted({note for *_, notes in every for note in notes})
        return first, silent, any(not _same(other, first) for other, *_ in every), noted


def _noted_of(model: nn.Module, run: Run, reads: Mapping[str, str]) -> list[str]:
    """What a run did beside its figures, or with them.

    Args:
        reads: see :class:`WeightReads`.
    """
    dtypes = {dtype for state in crossbar_states(model) for dtype in state.autocasts}
    notes = [f"evaluated under autocast to {str(dtype).removeprefix('torch.')}" for dtype in dtypes]
    if run.kind != "digital" and any(layer.counter.digital_calls for layer in crossbar_layers(model).values()):
        notes.append("evaluate ran the model digitally too: figures of that are no chip's")
    if reads:
        shown = ", ".join(f"{name} ({first})" for name, first in reads.items())
        notes.append(f"weights of crossbars were computed with beside their cells, which is digital: {shown}")
        logger.warning("%s", notes[-1])
    return sorted(notes)


def _same(a: dict[str, float], b: dict[str, float]) -> bool:
    """Up to the order of sums."""
    return a.keys() == b.keys() and np.allclose([a[name] for name in b], list(b.values()), rtol=1e-5, equal_nan=True)


def numbers_of(result: Any) -> dict[str, float]:
    """What an evaluation returned, by name; one number is a ``metric``.

    Raises:
        ValueError: it returned something else, or nothing.
    """
    items = result.items() if isinstance(result, Mapping) else [("metric", result)]
    metrics = {}
    for key, value in items:
        try:
            metrics[str(key)] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"evaluate returned {key}={value!r}: allowed are numbers") from None
    if not metrics:
        raise ValueError("evaluate returned no metrics")
    return metrics
