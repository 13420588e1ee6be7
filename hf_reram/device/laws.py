"""How a spread goes on beyond the last time that was measured."""

import numpy as np

# By name: what is linear in the law's measure of log time.
LAWS = {
    "variance": "the variance is linear in log t",
    "std": "the spread is linear in log t",
    "power": "the spread is a power of t",
    "saturating": "the variance is linear in log t first and then saturates",
}


def progress(law: str, log: np.ndarray | float, saturation: float) -> np.ndarray:
    """What the law is linear in: e-folds of time since the last one measured, ``L``, or ``(1 - exp(-κ L)) / κ``."""
    log = np.asarray(log, dtype=float)
    return -np.expm1(-saturation * log) / saturation if law == "saturating" else log


def transformed(law: str, std: np.ndarray) -> np.ndarray:
    """What of a spread [µS] is linear in :func:`progress`: its square, itself, or its logarithm."""
    if law == "power":
        return np.log(std)
    return std if law == "std" else std**2


def restored(law: str, value: np.ndarray) -> np.ndarray:
    """The spread [µS] of which :func:`transformed` is ``value``; none below 0."""
    if law == "power":
        return np.exp(np.minimum(value, 50.0))
    return np.maximum(value, 0.0) if law == "std" else np.sqrt(np.maximum(value, 0.0))
