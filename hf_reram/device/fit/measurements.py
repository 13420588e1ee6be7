"""From measured tables to a device's fields."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..checks import number, shown
from ..empirical import EmpiricalRetention, Series
from ..laws import transformed
from ..relaxation import Gaussian
from ..retention import RETENTION_TYPES
from ..temperature import parse_temperature
from .bands import Bands, bands, edges
from .extrapolation import LawFit, choose_law
from .files import Source
from .formulas import fit_formulas
from .goodness import goodness
from .heat import heat
from .iv import fit_iv
from .quantiles import QUANTILES, rows, table
from .reads import FEWEST, Measured, Read, Skip, collect
from .result import Candidate, Fit

BANDS, LAW_BANDS = 16, 8  # of conductance, for formulas and for the law in time
USUAL = 0.01, 0.97  # of first conductances, the window that is taken where none is given; some overshoot
EDGE = 0.02  # of the window, by which cells may lie beyond it
BORROWED = 0.5  # relative error of a rate that is another temperature's
DIGITS = 1e-4  # of the window, that changes are rounded to


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
        assumed.discard("v0")
        skipped += curvature.skipped
        parts |= {"curvature": curvature, "sweeps": tuple(sweeps)}
        low, high = (
            float(f"{value:.3g}")
            for value in np.quantile([state.g for state in curvature.states] or [curvature.v0.g], (0, 1))
        )
        found |= {"g_min": low if high > low else 0.0, "g_max": high}
    if retention is not None or bake is not None:
        measured = collect(_several(retention), _several(bake), room)
        low, high = _window(measured, g_min, g_max)
        found |= {"g_min": low, "g_max": high}
        reads = [_within(read, low, high) for read in measured.reads]
        reference = _reference(reads)
        found["reference_temperature"] = reference
        candidates, law, warmth, told = _retention(reads, low, high, reference)
        if warmth is not None and warmth.energy is not None and not warmth.misses:
            found["activation_energy"] = float(f"{warmth.energy:.3g}")
            assumed.discard("activation_energy")
        skipped += measured.skipped
        notes += measured.notes + told
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
    if inside.sum() < FEWEST:
        raise ValueError(
            f"{inside.sum()} of {len(inside)} cells read at {read.time:g} s, {read.temperature:g} K lie within {low:g} "
            f"to {high:g} µS: allowed are {FEWEST} and more; are g_min and g_max in µS?"
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
    notes: list[str] = []
    nodes = rows(low, high, min(len(read.g) for read in reads))
    at_reference = [read for read in reads if read.temperature == reference]
    law = choose_law(_bands(at_reference, window, LAW_BANDS))
    kelvins = sorted({read.temperature for read in reads})
    empirical = _tables(reads, nodes, kelvins, reference, law, notes, high - low)
    of = [band for kelvin in kelvins for band in _bands([r for r in reads if r.temperature == kelvin], window, BANDS)]
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


def _bands(reads: Sequence[Read], window: tuple[float, float], most: int) -> list[Bands]:
    found = edges(reads, window, most)
    return [bands(read, found) for read in reads]


def _tables(
    reads: Sequence[Read],
    nodes: np.ndarray,
    kelvins: Sequence[float],
    reference: float,
    law: LawFit | None,
    notes: list[str],
    g_range: float,
) -> EmpiricalRetention:
    """Tables of all reads. Temperatures with too few times for a law take over the reference's rates, by what of the
    spread their law is linear in."""
    step = 10.0 ** np.floor(np.log10(DIGITS * g_range))
    made = {
        kelvin: {
            read.time: np.maximum.accumulate(np.round(table(read.g, read.change, nodes) / step) * step, axis=1)
            for read in reads
            if read.temperature == kelvin
        }
        for kelvin in kelvins
    }
    rates: dict[float, dict[str, tuple[float, ...]]] = {kelvin: {} for kelvin in kelvins}

    def put(kelvin: float, **of: np.ndarray) -> None:
        rates[kelvin] = {name: tuple(float(f"{v:.4g}") for v in values) for name, values in of.items()}

    g = tuple(float(f"{v:.6g}") for v in nodes)

    def retention() -> EmpiricalRetention:
        series = tuple(
            Series(kelvin, tuple(tables), tuple(map(_texts, tables.values())), **rates[kelvin])
            for kelvin, tables in made.items()
        )
        return EmpiricalRetention(
            g,
            QUANTILES,
            series,
            None if law is None else law.law,
            None if law is None else law.saturation,
            None if law is None else float(f"{law.decade_error:.3g}"),
        )

    if law is None:
        return retention()
    first = retention()
    of_reference = first.series[kelvins.index(reference)]
    # As shares of spreads, which change more within a band than such shares do, above all next to g_min.
    share = _std(first, reference, of_reference.times[-1], nodes) / np.interp(nodes, law.g, law.last_std)
    by_law = _by_law(law.law, share)
    rate, rate_error, mean, mean_error = (
        np.interp(nodes, law.g, values)
        for values in (law.spread_rate, law.spread_rate_error, law.mean_rate, law.mean_rate_error)
    )
    put(
        reference,
        spread_rate=rate * by_law,
        spread_rate_error=rate_error * by_law,
        mean_rate=mean,
        mean_rate_error=mean_error,
    )
    if others := [kelvin for kelvin in kelvins if kelvin != reference]:
        first = retention()
        of_reference = first.series[kelvins.index(reference)]
        for kelvin in others:
            one = first.series[kelvins.index(kelvin)]
            time = min(max(one.times[-1], of_reference.times[0]), of_reference.times[-1])
            here = _std(first, kelvin, one.times[-1], nodes)
            there = np.maximum(_std(first, reference, time, nodes), 1e-9)
            share = here / there
            by_law = _by_law(law.law, share)
            spread, mean = (np.array(getattr(of_reference, rate)) for rate in ("spread_rate", "mean_rate"))
            put(
                kelvin,
                spread_rate=spread * by_law,
                spread_rate_error=BORROWED * spread * by_law,
                mean_rate=mean * share,
                mean_rate_error=BORROWED * np.abs(mean * share),
            )
        notes.append(
            f"beyond the last read at {', '.join(f'{k:g}' for k in others)} K changes go on relative to their size as "
            f"at {reference:g} K, which is assumed"
        )
    return retention()


def _by_law(law: str, share: np.ndarray) -> np.ndarray:
    """By what rates differ between spreads whose ratio is ``share``, if they grow relative to their size."""
    return np.ones_like(share) if law == "power" else transformed(law, share)


def _std(retention: EmpiricalRetention, kelvin: float, time: float, nodes: np.ndarray) -> np.ndarray:
    return retention.changes(time, kelvin).moments(torch.from_numpy(nodes))[1].numpy()


def _texts(rows: np.ndarray) -> tuple[str, ...]:
    return tuple(" ".join(f"{value:.6g}" for value in row) for row in rows)


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
