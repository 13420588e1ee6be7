"""Statistics of changes within bands of conductance, with standard errors; formulas and laws are fitted to them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .reads import Read

FEWEST = 50  # cells of a band


@dataclass(frozen=True)
class Bands:
    """Of one read; all (bands,).

    Attributes:
        temperature: K. time: s. g: mean conductance [µS]. cells: how many. mean, std: of the change [µS]. mean_error:
            standard error of the mean [µS]. std_error: of the spread, relative to it.
    """

    temperature: float
    time: float
    g: np.ndarray
    cells: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    mean_error: np.ndarray
    std_error: np.ndarray


def bands(read: Read, edges: np.ndarray) -> Bands:
    """Statistics of the cells between edges [µS], around the line that their means follow within a band."""
    found = []
    for low, high in itertools.pairwise(edges):
        inside = (read.g >= low) & (read.g < high)
        g, change = read.g[inside], read.change[inside]
        slope = np.cov(g, change)[0, 1] / g.var() if g.var() > 0 else 0.0
        off = change - change.mean() - slope * (g - g.mean())
        n, std = len(g), max(float(off.std()), 1e-9)
        fourth = float((off**4).mean()) / std**4
        found.append((g.mean(), n, change.mean(), std, std / n**0.5, max((fourth - 1) / (4 * n), 1 / (4 * n)) ** 0.5))
    return Bands(read.temperature, read.time, *(np.array(column) for column in zip(*found)))


def edges(reads: Sequence[Read], window: tuple[float, float], most: int) -> np.ndarray:
    """Of at most ``most`` bands that hold about as many cells each, at least 50 at every time, or less where the whole
    window does; between conductances, where cells were programmed to a few."""
    fewest = min(reads, key=lambda read: len(read.g))
    g = fewest.g[(fewest.g >= window[0]) & (fewest.g <= window[1])]
    levels = np.unique(g)
    if len(levels) <= most:
        inner = (levels[:-1] + levels[1:]) / 2
    else:
        inner = np.unique(np.quantile(g, np.linspace(0, 1, int(np.clip(len(g) // FEWEST, 1, most)) + 1)[1:-1]))
    kept = [-np.inf]
    for edge in [*inner, np.inf]:
        if all(((read.g >= kept[-1]) & (read.g < edge)).sum() >= FEWEST for read in reads):
            kept.append(edge)
    return np.array([*kept[:-1], np.inf] if len(kept) > 1 else [-np.inf, np.inf])


def split(reads: Sequence[Read], window: tuple[float, float], most: int) -> list[Bands]:
    """Statistics of several reads within bands of the same edges."""
    found = edges(reads, window, most)
    return [bands(read, found) for read in reads]
