"""How the spread goes on after the last read: a law that later reads, left out, have decided.

Each law is a straight line for each band of conductances (see :mod:`hf_reram.device.laws`). It is fitted to the first
reads alone and compared with those that follow, from two reads on; the last time alone left out is the last of these
comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..laws import LAWS, progress, restored, transformed
from .bands import Bands

STRAIGHT = tuple(law for law in LAWS if law != "saturating")  # two numbers a band
SATURATIONS = np.geomspace(0.01, 1.0, 25)  # per e-fold of time, that are tried
CLOSEST = 0.005  # relative, per decade; nothing is told more closely
NOISE = 0.02  # relative; no spread is compared more closely


@dataclass(frozen=True)
class Rates:
    """By how much bands change with log time; all (bands,).

    Attributes:
        g: µS. last_std: spreads of the last read as the law has them [µS]. spread, spread_error, mean, mean_error: see
            ``spread_rate`` and so on of :class:`hf_reram.device.empirical.Series`.
    """

    g: np.ndarray
    last_std: np.ndarray
    spread: np.ndarray
    spread_error: np.ndarray
    mean: np.ndarray
    mean_error: np.ndarray


@dataclass(frozen=True)
class LawFit:
    """The law in time, chosen at one temperature.

    Attributes:
        law: chosen, one of :data:`hf_reram.device.laws.LAWS`. saturation: of the law "saturating".
        scores: for each law that could be compared, the relative error (root mean square over bands) of spreads that
            were left out, over all comparisons. last: the same of the last time left out alone. signed: the mean of
            these with their signs.
        decade_error: relative error of the chosen law per decade of time beyond.
    """

    law: str
    saturation: float | None
    scores: dict[str, float]
    last: dict[str, float]
    signed: dict[str, float]
    decade_error: float


def choose_law(reads: Sequence[Bands]) -> LawFit | None:
    """The law that tells left-out reads best; None with less than three reads, of which none can be left
    out."""
    if len(reads) < 3:
        return None
    scores, last, signed, decades = {}, {}, {}, {}
    for law in LAWS:
        fewest = 2 if law in STRAIGHT else 4
        if len(reads) <= fewest:
            continue
        off = [_comparison(law, reads[:n], reads[n:]) for n in range(fewest, len(reads))]
        errors, weights, beyond = (np.concatenate([part[i] for part in off]) for i in range(3))
        scores[law] = float(np.sqrt((weights * errors**2).sum() / weights.sum()))
        alone = np.maximum(errors**2 - 1 / weights, 0.0)  # without what the left-out spreads' own errors make of it
        decades[law] = max(float(np.sqrt((weights * alone / beyond**2).sum() / weights.sum())), CLOSEST)
        errors, weights, _ = off[-1]
        last[law] = float(np.sqrt((weights * errors**2).sum() / weights.sum()))
        signed[law] = float((weights * errors).sum() / weights.sum())
    law = min((law for law in STRAIGHT if law in scores), key=lambda law: scores[law])
    if "saturating" in scores:  # against the best of the others in the comparisons that both can stand
        rival = [_comparison(law, reads[:n], reads[n:]) for n in range(4, len(reads))]
        errors, weights = (np.concatenate([part[i] for part in rival]) for i in range(2))
        if scores["saturating"] < float(np.sqrt((weights * errors**2).sum() / weights.sum())):
            law = "saturating"
    saturation = _saturation(reads) if law == "saturating" else None
    return LawFit(law, saturation, scores, last, signed, decades[law])


def rates(law: LawFit, reads: Sequence[Bands]) -> Rates:
    """Of a law, fitted to all reads of one temperature, at least two."""
    value, slope, error = _lines(law.law, reads, law.saturation or 0.0)
    log = np.log([read.time / reads[-1].time for read in reads])
    _, mean, mean_error = _regress(log, np.array([r.mean for r in reads]), np.array([r.mean_error for r in reads]))
    g = np.mean([read.g for read in reads], axis=0)
    return Rates(g, restored(law.law, value), np.maximum(slope, 0.0), error, mean, mean_error)


def _comparison(law: str, known: Sequence[Bands], later: Sequence[Bands]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of predicted by found spreads, their weights, and decades from the last that was known, of each band
    of each later read."""
    saturation = _saturation(known) if law == "saturating" else 0.0
    value, rate, _ = _lines(law, known, saturation)
    errors, weights, beyond = [], [], []
    for read in later:
        log = math.log(read.time / known[-1].time)
        predicted = restored(law, value + np.maximum(rate, 0.0) * progress(law, log, saturation))
        errors.append(np.log(np.maximum(predicted, 1e-9) / read.std))
        weights.append(1 / (read.std_error**2 + NOISE**2))
        beyond.append(np.full(len(read.std), max(log / math.log(10), 0.1)))
    return np.concatenate(errors), np.concatenate(weights), np.concatenate(beyond)


def _lines(law: str, reads: Sequence[Bands], saturation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each band the law's line through the reads: its value at the last of them, its slope, and the slope's
    standard error."""
    places = np.array([progress(law, math.log(read.time / reads[-1].time), saturation) for read in reads])
    std = np.array([read.std for read in reads])
    off = np.array([read.std_error for read in reads])
    steps = 1e-4 * std  # the transformation's slope, numerically
    slope = (transformed(law, std + steps) - transformed(law, std)) / steps
    return _regress(places, transformed(law, std), slope * std * off)


def _saturation(reads: Sequence[Bands]) -> float:
    """That of the least misfit, one for all bands."""

    def misfit(saturation: float) -> float:
        value, rate, _ = _lines("saturating", reads, saturation)
        total = 0.0
        for read in reads:
            log = math.log(read.time / reads[-1].time)
            found = restored("saturating", value + rate * progress("saturating", log, saturation))
            total += float((np.log(np.maximum(found, 1e-9) / read.std) ** 2 / read.std_error**2).sum())
        return total

    return float(min(SATURATIONS, key=misfit))


def _regress(x: np.ndarray, y: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted straight lines, one for each column of y: values at x = 0, slopes, and the slopes' standard errors,
    which grow where the line misses its points by more than their errors.

    Args:
        x: (reads,). y, errors: (reads, bands).
    """
    weights = 1 / np.maximum(errors, 1e-12) ** 2
    total = weights.sum(0)
    centre = (weights * x[:, None]).sum(0) / total
    off = x[:, None] - centre
    power = (weights * off**2).sum(0)
    slope = (weights * off * y).sum(0) / power
    level = (weights * y).sum(0) / total
    misfit = (weights * (y - level - slope * off) ** 2).sum(0) / max(len(x) - 2, 1)
    return level - slope * centre, slope, np.sqrt(np.maximum(misfit, 1.0) / power)
