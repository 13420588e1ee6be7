"""From measured tables to a device's fields."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks import number, shown
from ..relaxation import Gaussian
from ..retention import RETENTION_TYPES
from ..temperature import is_room, parse_temperature
from .bands import bands, edges, split
from .extrapolation import LawFit, choose_law
from .files import Source
from .formulas import fit_formulas
from .goodness import goodness
from .heat import heat
from .iv import fit_iv
from .reads import FEWEST, Measured, Read, Skip, collect
from .result import Candidate, Fit
from .tables import LAW_BANDS, tables

BANDS = 16  # of conductance, for formulas
USUAL = 0.01, 0.97  # of first conductances, the window that is taken where none is given; some overshoot
SMALL = 0.2  # µS; smaller ones are allowed, and may be in mS that were read as µS
LEAST = round(FEWEST * (USUAL[1] - USUAL[0]))  # cells in the window: what the usual one leaves of the fewest of a read
EDGE = 0.02  # of the window, by which cells may lie beyond it


def fit_measurements(
    retention: Source | Sequence[Source] | None = None,
    iv: Source | None = None,
    bake: Source | Sequence[Source] | None = None,
    *,
    g_min: float | None = None,
    g_max: float | None = None,
    model: str = "empirical",
    temperature: str | float = 298.15,
    name: str = "measured",
    source: str = "",
    **fields: Any,
) -> Fit:
    """Fit a device to its measurements.

    Tables are long, one row a reading: files (.csv, .tsv, .parquet, as they are or compressed), pandas DataFrames or
    mappings of columns. Columns are found by name, with the unit behind it: ``cell``, ``time_s``, ``conductance_uS``
    (or ``resistance_kohm``), ``target_uS``, ``programmed_uS`` (first conductance; else the read at time 0 is it),
    ``temperature_C``; of sweeps ``cell``, ``voltage_V``, ``current_uA``.

    Args:
        retention: reads over time, one table or several. iv: sweeps, for v0. bake: reads before and after heat; with a
            column of temperatures.
        g_min, g_max: the window [µS] that weights are mapped to; default the range of the targets, or that of first
            conductances but for the lowest 1 % and the highest 3 %.
        model: retention of the device: "empirical", "table", "log" or "generic". All that the data allow are fitted and
            compared.
        temperature: K or such as "25C", of tables of ``retention`` without a column of temperatures.
        name, source, fields: of the device, as they are.

    Raises:
        ValueError: a table lacks a column or a unit, holds what cannot be in its unit, or too few cells.
    """
    if retention is None and iv is None and bake is None:
        raise ValueError("nothing to fit: allowed are one or several of retention, iv and bake")
    if model not in RETENTION_TYPES:
        raise ValueError(f"model={shown(model)}: allowed is one of {sorted(RETENTION_TYPES)}")
    room = parse_temperature(temperature)
    found: dict[str, Any] = {"name": name, "source": source}
    assumed = {"v0", "read_voltage", "read_noise", "programming", "activation_energy"}
    parts: dict[str, Any] = {"candidates": ()}
    skipped: list[Skip] = []
    notes: list[str] = []
    if iv is not None:
        curvature, sweeps = fit_iv(iv)
        found["v0"] = float(f"{curvature.v0.value:.5g}")
        if curvature.misses:
            notes.append(f"v0 is not recommended for these sweeps, and stays assumed: {curvature.misses}")
        else:
            assumed.discard("v0")
        skipped += curvature.skipped
        notes += _doubt("currents over voltages", curvature.v0.g)
        parts |= {"curvature": curvature, "sweeps": tuple(sweeps)}
        low, high = (
            float(f"{value:.3g}")
            for value in np.quantile([state.g for state in curvature.states] or [curvature.v0.g], (0, 1))
        )
        found |= {"g_min": low if high > low else 0.0, "g_max": high}
    if retention is not None or bake is not None:
        measured = collect(_several(retention), _several(bake), room)
        low, high = _window(measured, g_min, g_max)
        notes += _doubt("conductances", high)
        found |= {"g_min": low, "g_max": high}
        reads = [_within(read, low, high) for read in measured.reads]
        reference = _reference(reads)
        found["reference_temperature"] = reference
        candidates, law, warmth, told = _retention(reads, low, high, reference)
        if warmth is not None and warmth.energy is not None and not warmth.misses:
            found["activation_energy"] = float(f"{warmth.energy:.3g}")
            assumed.discard("activation_energy")
        elif warmth is not None and warmth.misses:
            notes.append(
                f"one activation energy is not recommended for these bakes, and stays assumed: {warmth.misses}"
            )
        skipped += measured.skipped
        notes += measured.notes + told
        if not is_room(reference):
            notes.append(
                f"the reference temperature, which cells are at unless another is said, is {reference:g} K and not "
                "room temperature: most times were read there"
            )
        chosen = next((one for one in candidates if one.name == model), None)
        if chosen is None:
            raise ValueError(
                f"model={model!r}: the reads do not tell it; allowed are {[one.name for one in candidates]}"
            )
        if not chosen.recommended:
            notes.append(f"retention {model!r} is not recommended for these data: {chosen.goodness.misses}")
        found["retention"] = chosen.retention
        if programming := _programming(measured, low, high):
            found["programming"] = programming
            assumed.discard("programming")
        elif measured.from_target:
            notes.append("programming error is part of retention, and 0 by itself")
        parts |= {"candidates": tuple(candidates), "law": law, "heat": warmth, "reads": tuple(reads)}
    else:
        assumed |= {"g_min", "g_max"}
    for key, value in (("g_min", g_min), ("g_max", g_max)):
        if value is not None:
            found[key] = value
            assumed.discard(key)
    found |= fields
    found.setdefault("assumed", tuple(sorted(assumed - set(fields))))
    return Fit(fields=found, skipped=tuple(skipped), notes=tuple(notes), **parts)


def _doubt(what: str, g: float) -> list[str]:
    return [f"{what} of {g:.3g} µS are small for a cell: are the columns' units right?"] if g < SMALL else []


def _several(source: Source | Sequence[Source] | None) -> list[Source]:
    if source is None:
        return []
    return list(source) if isinstance(source, (list, tuple)) else [source]


def _window(measured: Measured, g_min: float | None, g_max: float | None) -> tuple[float, float]:
    g = np.concatenate([read.g for read in measured.reads])
    low, high = (float(f"{value:.3g}") for value in np.quantile(g, (0.0, 1.0) if measured.by_target else USUAL))
    low = low if g_min is None else number("device", "g_min", g_min, 0)
    high = high if g_max is None else number("device", "g_max", g_max, 0, exclusive=True)
    if high <= low:
        raise ValueError(f"device.g_max={high!r}: allowed is a conductance above g_min={low!r} µS")
    return max(low, 0.0), high


def _within(read: Read, low: float, high: float) -> Read:
    """Its cells in the window, or little beyond.

    Raises:
        ValueError: there are too few.
    """
    margin = EDGE * (high - low)
    inside = (read.g >= low - margin) & (read.g <= high + margin)
    if inside.sum() < LEAST:
        raise ValueError(
            f"{inside.sum()} of {len(inside)} cells read at {read.time:g} s, {read.temperature:g} K lie within {low:g} "
            f"to {high:g} µS: allowed are {LEAST} and more; are g_min and g_max in µS?"
        )
    return Read(read.temperature, read.time, read.g[inside], read.change[inside], read.rows[inside])


def _reference(reads: Sequence[Read]) -> float:
    """The temperature with the most times, of those the lowest."""
    kelvins = sorted({read.temperature for read in reads})
    return max(kelvins, key=lambda kelvin: (sum(read.temperature == kelvin for read in reads), -kelvin))


def _retention(
    reads: list[Read], low: float, high: float, reference: float
) -> tuple[list[Candidate], LawFit | None, Any, list[str]]:
    """The models, the tables first; the law in time; what heat tells; and notes."""
    window = (low, high)
    at_reference = [read for read in reads if read.temperature == reference]
    law = choose_law(split(at_reference, window, LAW_BANDS))
    kelvins = sorted({read.temperature for read in reads})
    empirical, notes = tables(reads, window, reference, law)
    of = [band for kelvin in kelvins for band in split([r for r in reads if r.temperature == kelvin], window, BANDS)]
    here = [band for band in of if band.temperature == reference]
    candidates = [
        Candidate(
            "empirical", empirical, goodness(lambda r: empirical.changes(r.time, r.temperature), reads, of, window), {}
        )
    ]
    for name, fitted in fit_formulas(here, low, high).items():
        model: Any = fitted.retention
        quality = goodness(lambda r, m=model: Gaussian(*_quietly(m, r.time)), at_reference, here, window)  # type: ignore[misc]
        candidates.append(Candidate(name, model, quality, fitted.parameters))
    latest = [[read for read in reads if read.temperature == kelvin][-1] for kelvin in kelvins]
    shared = edges(latest, window, LAW_BANDS)
    warmth = heat(empirical, [bands(read, shared) for read in latest], reference)
    return candidates, law, warmth, notes


def _quietly(model: Any, time: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.polynomials(time)


def _programming(measured: Measured, low: float, high: float) -> tuple[float, ...] | None:
    """Spread of first conductances about their targets, as a polynomial of the second degree."""
    if not measured.target:
        return None
    target, first = np.concatenate(measured.target), np.concatenate(measured.first)
    everywhere = _within(Read(0.0, 0.0, target, first - target, np.arange(len(target))), low, high)
    band = bands(everywhere, edges([everywhere], (low, high), BANDS))
    degree = min(2, len(band.g) - 1)
    found = np.polyfit(band.g, band.std, degree, w=1 / (band.std * band.std_error))
    return tuple(float(f"{value:.5g}") for value in found[::-1])
