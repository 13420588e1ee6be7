"""The sinh I–V of a cell and what it makes of a normalized input.

A cell of conductance g [µS] read at v [V] passes ``I = g v0 sinh(v / v0)`` [µA]. The DAC drives
``v = read_voltage · range_shrink · u`` for the normalized input ``u = clamp(x / input_range, -1, 1)``, so with
``b = read_voltage · range_shrink / v0`` the array sees ``sinh(b u)`` and the layer computes

    phi(x) = input_range · gain(b) · sinh(b u).
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GAINS = ("calibrated", "full_scale", "small_signal")

# Below this b the curve is a straight line to float32 precision: sinh(bu)/b - u = b² u³/6 < 2e-9.
LINEAR_B = 1e-4


def cell_current(g: Tensor | float, v: Tensor | float, v0: float) -> Tensor:
    """``I = g v0 sinh(v / v0)`` [µA] for conductances ``g`` [µS] at voltages ``v`` [V], broadcast together."""
    return torch.as_tensor(g) * v0 * torch.sinh(torch.as_tensor(v) / v0)


def full_scale_gain(b: float) -> float:
    """``1 / sinh(b)``: phi is exact at u = ±1."""
    return 1 / math.sinh(b)


def small_signal_gain(b: float) -> float:
    """``1 / b``: phi is exact at u = 0."""
    return 1 / b


def least_squares_gain(u: Tensor, weights: Tensor, b: float) -> float:
    """The gain that minimizes ``E (gain sinh(b u) - u)²``: ``E[u sinh(bu)] / E[sinh²(bu)]``.

    Args:
        u: normalized inputs, any shape. weights: how often each occurs, same shape.
        b: dimensionless. Where all inputs are zero any gain fits, and the small-signal one is returned.
    """
    u = u.double()
    s = torch.sinh(b * u)
    power = float((weights * s * s).sum())
    return float((weights * u * s).sum()) / power if power > 0 else small_signal_gain(b)


def uniform_gain(b: float) -> float:
    """:func:`least_squares_gain` for u uniform in [-1, 1], in closed form: used until data are seen."""
    if b < 0.05:
        return (1 - b * b / 10) / b  # the closed form cancels here; this series is exact to 1e-7
    return (math.cosh(b) / b - math.sinh(b) / b**2) / (math.sinh(2 * b) / (4 * b) - 0.5)


@lru_cache(maxsize=4096)
def sinh_coefficients(b: float) -> tuple[float, ...]:
    """Coefficients ``c_k`` with ``sinh(t) = t Σ c_k t^(2k)`` on ``|t| <= b`` to float32 precision (relative 6e-8).

    Chebyshev interpolation of ``sinh(√q)/√q`` on ``q in [0, b²]``, of the least degree that reaches the precision.
    """
    top = b * b

    def target(q):
        root = np.sqrt(q)
        return np.where(q > 1e-8, np.sinh(root) / np.maximum(root, 1e-12), 1 + q / 6)

    grid = np.linspace(0, top, 257)
    for degree in range(1, 12):
        fit = np.polynomial.Chebyshev.interpolate(target, degree, domain=[0, top])
        series = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1])
        if np.max(np.abs(series(grid) / target(grid) - 1)) < 6e-8:
            break
    return tuple(float(c) for c in series.coef)


# Up to this b a polynomial gives :func:`range_slope`.
SERIES_B = 0.8


@lru_cache(maxsize=4096)
def range_slope_coefficients(b: float) -> tuple[float, ...]:
    """Coefficients ``c_k`` with ``t - asinh(t) sqrt(1 + t²) = t³ Σ c_k t^(2k)`` on ``|t| <= sinh(b)``, ``b <= 0.8``, to
    within 1e-7 of the largest t: how ``p sinh(b x / p)`` changes with p, at ``t = sinh(b x / p)``.

    Chebyshev interpolation in ``q = t²``, of the least degree that reaches the precision.
    """
    top = math.sinh(b) ** 2

    def target(q):
        t = np.sqrt(np.maximum(q, 1e-4))
        return np.where(q > 1e-4, (t - np.arcsinh(t) * np.sqrt(1 + t * t)) / t**3, -1 / 3 + 2 * q / 15)

    grid = np.linspace(0, top, 257)
    for degree in range(0, 12):
        fit = np.polynomial.Chebyshev.interpolate(target, degree, domain=[0, top])
        series = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1])
        if np.max(np.abs(series(grid) - target(grid))) * top < 1e-7:
            break
    return tuple(float(c) for c in series.coef)
