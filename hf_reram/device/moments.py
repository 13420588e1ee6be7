"""The retention error of a cell pair in units of its weight, as polynomials of |w|.

One cell of each pair is always at g_min, so mean and variance of ``W(t) - W`` depend on ``a = |w|`` alone:

    m  = w_scale/Δg · (μ(g_min + Δg a) - μ(g_min)) · sign(w)
    s² = (w_scale/Δg)² · (σ²(g_min + Δg a) + σ²(g_min))
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .cell import DeviceConfig
from .retention import Polynomial, horner

# Degree of the fit where σ is clamped at zero somewhere and σ² is therefore no polynomial.
_CLAMPED_DEGREE = 12


@dataclass(frozen=True)
class WeightError:
    """Moments of the error of a weight ``a = |w| in [0, 1]`` with ``w_scale = 1``.

    Attributes:
        variance: coefficients in ``a`` of s², averaged over the times, lowest power first.
        variance_slope: coefficients of its derivative.
        means: for each time, coefficients in ``a`` of m.
        std, floor: for one time where σ is a polynomial throughout, ``s² = std(a)² + floor``, at half the degree;
            otherwise std is None.
    """

    variance: Polynomial
    variance_slope: Polynomial
    means: tuple[Polynomial, ...]
    std: Polynomial | None = None
    floor: float = 0.0

    @property
    def mean_is_linear(self) -> bool:
        """Whether every m is proportional to the weight, so that its output error is a multiple of the output."""
        return all(abs(c) < 1e-12 for mean in self.means for c in (mean[0], *mean[2:]))

    @property
    def mean_square(self) -> float:
        """Mean over the times of the squared factor by which a linear m scales the weights."""
        return sum(mean[1] ** 2 for mean in self.means) / len(self.means)

    def averaged(self, pairs: int) -> "WeightError":
        """The moments where each weight is the average of several cell pairs, whose spreads are independent."""
        if pairs == 1:
            return self
        return replace(
            self,
            variance=tuple(c / pairs for c in self.variance),
            variance_slope=tuple(c / pairs for c in self.variance_slope),
            std=None if self.std is None else tuple(c / pairs**0.5 for c in self.std),
            floor=self.floor / pairs,
        )


@lru_cache(maxsize=256)
def weight_error(device: DeviceConfig, times: tuple[float, ...], temperature: float | None) -> WeightError:
    """The moments for a device at one or several times.

    Args:
        times: s. temperature: K, None for the device's reference temperature.
    """
    pairs = [device.retention.polynomials(device.equivalent_time(t, temperature)) for t in times]
    degree = 2 * max(len(std) - 1 for _, std in pairs)
    a = (1 - np.cos(np.linspace(0, np.pi, 201))) / 2  # Chebyshev points resolve both ends
    clamped = any(np.min(horner(std, device.g_min + device.g_range * a)) < 0 for _, std in pairs)
    if clamped:
        degree = max(degree, _CLAMPED_DEGREE)
    square = np.mean([_pair_variance(device, std, a) for _, std in pairs], axis=0)
    fit = np.polynomial.Chebyshev.fit(a, square, degree, domain=[0, 1])
    variance = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1])
    means = tuple(_pair_mean(device, mean) for mean, _ in pairs)
    slope = _plain(variance.deriv()) if degree else (0.0,)
    if clamped or len(pairs) > 1:
        return WeightError(_plain(variance), slope, means)
    std = _composed(device, pairs[0][1]) / device.g_range
    return WeightError(_plain(variance), slope, means, tuple(std.tolist()), float(std[0]) ** 2)


@lru_cache(maxsize=4096)
def white_error(std: float) -> WeightError:
    """The moments of an error that does not depend on the weight, with standard deviation ``std · w_scale``."""
    return WeightError((std**2,), (0.0,), ((0.0, 0.0),), (std,), 0.0)


def _pair_variance(device: DeviceConfig, std: Polynomial, a: np.ndarray) -> np.ndarray:
    high, low = (np.maximum(horner(std, device.g_min + device.g_range * x), 0.0) for x in (a, np.zeros(1)))
    return np.asarray(high**2 + low**2, dtype=float) / device.g_range**2


def _pair_mean(device: DeviceConfig, mean: Polynomial) -> Polynomial:
    shifted = _composed(device, mean) / device.g_range
    coefficients = np.zeros(max(2, len(shifted)))
    coefficients[: len(shifted)] = shifted
    coefficients[0] = 0.0  # minus the g_min cell's own shift
    return tuple(float(c) for c in coefficients)


def _composed(device: DeviceConfig, polynomial: Polynomial) -> np.ndarray:
    """Coefficients in ``a`` of a polynomial in the conductance ``g_min + Δg a``."""
    in_a = np.polynomial.Polynomial(polynomial)(np.polynomial.Polynomial([device.g_min, device.g_range]))
    return np.atleast_1d(np.asarray(getattr(in_a, "coef", in_a), dtype=float))


def _plain(polynomial) -> Polynomial:
    return tuple(float(c) for c in polynomial.coef)
