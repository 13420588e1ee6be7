"""The formulas of retention, fitted to means and spreads within bands of conductance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from scipy.stats import t as student

from ..retention import GenericRetention, LogRetention, RetentionModel, TableRetention
from .bands import Bands

DEGREE = 4  # of polynomials in the conductance
CONFIDENCE = 0.95

Parameters = dict[str, tuple[float, float, float]]  # the value, and its confidence interval's ends


@dataclass(frozen=True)
class Fitted:
    """Attributes:
    retention: the model. parameters: each with its interval of confidence, by the names of the model's fields.
    """

    retention: RetentionModel
    parameters: Parameters


def fit_formulas(of: Sequence[Bands], g_min: float, g_max: float) -> dict[str, Fitted]:
    """Each model that the reads of one temperature can tell, by its name in a device's JSON form."""
    found = {"table": _table(of, g_max)}
    later = [band for band in of if band.time >= 1.0]  # from where the logarithm's formula is meant
    if len(later) >= 2:
        found["log"] = _log(later, g_max)
    if len(of) >= 2:
        found["generic"] = _generic(of, g_min)
    return found


def _table(of: Sequence[Bands], g_ref: float) -> Fitted:
    rows: dict[str, list[tuple[float, ...]]] = {"std": [], "mean": []}
    parameters: Parameters = {}
    for i, band in enumerate(of):
        powers = _powers(band.g / g_ref, len(band.g))
        for name, y, error in (("std", band.std, band.std * band.std_error), ("mean", band.mean, band.mean_error)):
            found = _linear(powers, y, error)
            rows[name].append(tuple(found.x))
            parameters |= _intervals(found, [f"{name}[{i}][{k}]" for k in range(powers.shape[1])])
    times = tuple(band.time for band in of)
    return Fitted(TableRetention(times, tuple(rows["std"]), tuple(rows["mean"]), g_ref), parameters)


def _log(of: Sequence[Bands], g_ref: float) -> Fitted:
    g, log = (np.concatenate(v) for v in ([b.g for b in of], [np.full(len(b.g), np.log(b.time)) for b in of]))
    powers = _powers(g / g_ref, len(of[0].g))
    design = np.hstack((powers, powers * log[:, None]))
    scale = g_ref ** -np.arange(powers.shape[1])
    fields: dict[str, Any] = {}
    parameters: Parameters = {}
    for name in ("std", "mean"):
        y = np.concatenate([getattr(b, name) for b in of])
        error = np.concatenate([b.std * b.std_error if name == "std" else b.mean_error for b in of])
        found = _linear(design, y, error)
        for part, start in (("offset", 0), ("slope", powers.shape[1])):
            names = [f"{name}_{part}[{k}]" for k in range(powers.shape[1])]
            fields[f"{name}_{part}"] = tuple(found.x[start : start + len(names)] * scale)
            intervals = _intervals(found, names, start)
            parameters |= {key: tuple(v * scale[k] for v in intervals[key]) for k, key in enumerate(names)}
    return Fitted(LogRetention(**fields, measured_until=of[-1].time), parameters)


def _generic(of: Sequence[Bands], g_min: float) -> Fitted:
    names = ("A", "tau", "s0", "s1", "s2")

    def residuals(p: np.ndarray) -> np.ndarray:
        off = []
        for band in of:
            log = np.log1p(band.time / np.exp(p[1]))
            mean = -min(p[0] * log, 1.0) * (band.g - g_min)
            std = p[2] + (p[3] + p[4] * band.g) * log
            off += [(mean - band.mean) / band.mean_error, (std - band.std) / (band.std * band.std_error)]
        return np.concatenate(off)

    first, last = of[0], of[-1]
    log = max(np.log(last.time / first.time), 1.0)
    slope = max(float((last.std - first.std).mean()) / log, 1e-6)
    tries = []
    for tau in np.log([of[0].time, (of[0].time * of[-1].time) ** 0.5]):
        start = [1e-3, tau, max(float(first.std.min()) / 2, 1e-6), slope, slope / max(float(last.g.mean()), 1e-6)]
        bounds = ([0, np.log(1e-9), 0, 0, 0], [np.inf, np.log(1e9), np.inf, np.inf, np.inf])
        scale = np.maximum(np.abs(start), 1e-6)
        tries.append(least_squares(residuals, start, loss="soft_l1", bounds=bounds, x_scale=scale, max_nfev=2000))
    found = min(tries, key=lambda one: one.cost)
    parameters = _intervals(found, list(names))
    value, low, high = parameters["tau"]
    parameters["tau"] = (float(np.exp(value)), float(np.exp(max(low, -700))), float(np.exp(min(high, 700))))
    a, tau, s0, s1, s2 = (parameters[name][0] for name in names)
    return Fitted(GenericRetention(a, tau, s0, s1, s2, g_min, measured_until=last.time), parameters)


def _powers(x: np.ndarray, bands: int) -> np.ndarray:
    return np.vander(x, min(DEGREE, max(bands - 2, 0)) + 1, increasing=True)


def _linear(design: np.ndarray, y: np.ndarray, error: np.ndarray) -> OptimizeResult:
    """Robust least squares of a line: bands that miss it by many standard errors count less."""
    scaled, aim = design / error[:, None], y / error
    start = np.linalg.lstsq(scaled, aim, rcond=None)[0]
    jacobian: Callable = lambda p: scaled  # noqa: E731
    return least_squares(lambda p: scaled @ p - aim, start, jac=jacobian, loss="soft_l1")


def _intervals(found: OptimizeResult, names: Sequence[str], start: int = 0) -> Parameters:
    """Of parameters from ``start`` on; wider where the model misses its points by more than their errors."""
    free = max(len(found.fun) - len(found.x), 1)
    misfit = max(2 * found.cost / free, 1.0)
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * misfit
    half = np.sqrt(np.diag(covariance)) * student.ppf(0.5 + CONFIDENCE / 2, free)
    return {
        name: (
            float(found.x[start + k]),
            float(found.x[start + k] - half[start + k]),
            float(found.x[start + k] + half[start + k]),
        )
        for k, name in enumerate(names)
    }
