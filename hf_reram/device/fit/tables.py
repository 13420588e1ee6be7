"""Empirical retention of all reads: their tables, and how they go on past the last one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..empirical import EmpiricalRetention, Series
from ..laws import transformed
from .bands import split
from .extrapolation import LawFit, rates
from .quantiles import QUANTILES, rows, table
from .reads import Read

LAW_BANDS = 8  # of conductance
BORROWED = 0.5  # relative error of a rate that is another temperature's
DIGITS = 1e-4  # of the window, that changes are rounded to

Rate = dict[str, np.ndarray]  # of a Series, by the names of its fields


def tables(
    reads: Sequence[Read], window: tuple[float, float], reference: float, law: LawFit | None
) -> tuple[EmpiricalRetention, list[str]]:
    """The retention, and what is assumed in it.

    Args:
        reads: in ascending order of temperature and time. window: g_min and g_max [µS]. reference: K, where the law was
            chosen. law: None to hold the last value.
    """
    nodes = np.array([float(f"{g:.6g}") for g in rows(*window, min(len(read.g) for read in reads))])
    kelvins = sorted({read.temperature for read in reads})
    of = {kelvin: [read for read in reads if read.temperature == kelvin] for kelvin in kelvins}
    step = 10.0 ** np.floor(np.log10(DIGITS * (window[1] - window[0])))
    changes = {kelvin: tuple(_texts(table(r.g, r.change, nodes), step) for r in of[kelvin]) for kelvin in kelvins}

    def made(rate: dict[float, Rate]) -> EmpiricalRetention:
        series = []
        for kelvin in kelvins:
            rounded: dict[str, Any] = {
                name: tuple(float(f"{v:.4g}") for v in values) for name, values in rate.get(kelvin, {}).items()
            }
            times = tuple(read.time for read in of[kelvin])
            series.append(Series(kelvin, times, changes[kelvin], **rounded))
        if law is None:
            return EmpiricalRetention(tuple(nodes.tolist()), QUANTILES, tuple(series))
        error = float(f"{law.decade_error:.3g}")
        return EmpiricalRetention(tuple(nodes.tolist()), QUANTILES, tuple(series), law.law, law.saturation, error)

    held = made({})
    if law is None:
        return held, []
    told = [kelvin for kelvin in kelvins if len(of[kelvin]) >= 3]
    rate = {kelvin: _own(held, law, of[kelvin], window) for kelvin in told}
    borrowed = [kelvin for kelvin in kelvins if kelvin not in told]
    going = made(rate)
    rate |= {kelvin: _borrowed(going, law, rate[reference], reference, kelvin) for kelvin in borrowed}
    notes = []
    if borrowed:
        notes.append(
            f"past the last read at {', '.join(f'{k:g}' for k in borrowed)} K changes go on relative to their size as "
            f"at {reference:g} K, which is assumed"
        )
    return made(rate), notes


def _own(held: EmpiricalRetention, law: LawFit, reads: Sequence[Read], window: tuple[float, float]) -> Rate:
    """The law's rates at one temperature: those of bands, as shares of spreads, which change more within a band than
    such shares do, above all next to g_min."""
    of, nodes = rates(law, split(reads, window, LAW_BANDS)), np.array(held.g)
    share = _std(held, reads[-1].temperature, reads[-1].time) / np.maximum(np.interp(nodes, of.g, of.last_std), 1e-9)
    by_law = _by_law(law.law, share)
    return {
        "spread_rate": np.interp(nodes, of.g, of.spread) * by_law,
        "spread_rate_error": np.interp(nodes, of.g, of.spread_error) * by_law,
        "mean_rate": np.interp(nodes, of.g, of.mean),
        "mean_rate_error": np.interp(nodes, of.g, of.mean_error),
    }


def _borrowed(going: EmpiricalRetention, law: LawFit, rate: Rate, reference: float, kelvin: float) -> Rate:
    """Rates at a temperature whose times do not tell them: the reference's, relative to the spreads about that time."""
    series = {one.temperature: one for one in going.series}
    last, times = series[kelvin].times[-1], series[reference].times
    there = _std(going, reference, min(max(last, times[0]), times[-1]))
    share = _std(going, kelvin, last) / np.maximum(there, 1e-9)
    spread, mean = rate["spread_rate"] * _by_law(law.law, share), rate["mean_rate"] * share
    return {
        "spread_rate": spread,
        "spread_rate_error": BORROWED * spread,
        "mean_rate": mean,
        "mean_rate_error": BORROWED * np.abs(mean),
    }


def _by_law(law: str, share: np.ndarray) -> np.ndarray:
    """By what rates differ between spreads whose ratio is ``share``, if they grow relative to their size."""
    return np.ones_like(share) if law == "power" else transformed(law, share)


def _std(retention: EmpiricalRetention, kelvin: float, time: float) -> np.ndarray:
    """Spreads at the tables' rows [µS]."""
    g = torch.from_numpy(np.array(retention.g))
    return retention.changes(time, kelvin).moments(g)[1].numpy()


def _texts(change: np.ndarray, step: float) -> tuple[str, ...]:
    rounded = np.maximum.accumulate(np.round(change / step) * step, axis=1)
    return tuple(" ".join(f"{value:.6g}" for value in row) for row in rounded)
