"""From changes of single cells to a table: quantiles at some conductances.

``change = m(g) + s(g) r``: mean and size are smooth curves, and what is left has a distribution that varies slowly with
g, so that many cells tell its quantiles.
"""

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtri

# Of the tables: the tails matter as much as the middle.
QUANTILES = (
    *(0.0005, 0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4),
    0.5,
    *(0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 0.995, 0.998, 0.9995),
)
CELLS_A_ROW, MOST_ROWS = 150, 29
NEIGHBOURS = 250, 800  # cells, at least and at most, that tell the quantiles at a conductance
SMOOTHNESS = 10.0 ** np.arange(-3, 5)  # what is tried


def rows(g_min: float, g_max: float, cells: int) -> np.ndarray:
    """Conductances of a table's rows [µS], for the number of cells of the read with the fewest: the denser the lower,
    where a spread changes most with the conductance, and where half of all cells of differential pairs are."""
    places = np.linspace(0, 1, int(np.clip(cells // CELLS_A_ROW, 3, MOST_ROWS)))
    return g_min + (g_max - g_min) * places**1.5


def table(g: np.ndarray, change: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Quantiles of the change, (nodes, quantiles), each row ascending.

    Args:
        g: each cell's conductance [µS]. change: its change [µS]. nodes: conductances of the rows [µS].
    """
    mean = smooth(g, change, nodes)
    off = change - np.interp(g, nodes, mean)
    size = smooth(g, np.abs(off), nodes)
    size = np.maximum(size, 0.1 * np.median(size))
    rest = off / np.interp(g, nodes, size)
    reach = 2 * np.gradient(nodes)
    shape = np.stack([_shape(rest, np.abs(g - node), width) for node, width in zip(nodes, reach)])
    return mean[:, None] + size[:, None] * shape


def smooth(g: np.ndarray, y: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Values at the nodes of the broken line that fits y best, with the penalty on its bends that generalized
    cross-validation chooses."""
    basis = hats(g, nodes)
    inner, outer = basis.T @ basis, basis.T @ y
    bends = np.diff(np.eye(len(nodes)), 2, axis=0)
    unit = len(g) / len(nodes)
    best = np.inf, np.zeros(len(nodes))
    for strength in SMOOTHNESS:
        matrix = inner + unit * strength * bends.T @ bends + 1e-9 * unit * np.eye(len(nodes))
        found = np.linalg.solve(matrix, outer)
        free = len(g) - np.trace(np.linalg.solve(matrix, inner))
        score = float(((y - basis @ found) ** 2).sum()) / free**2
        if score < best[0]:
            best = score, found
    return best[1]


def hats(g: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The weights of the nodes in a broken line at conductances, (cells, nodes); flat beyond the ends."""
    places = np.interp(g, nodes, np.arange(len(nodes)))
    return np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(len(nodes))))


def _shape(rest: np.ndarray, away: np.ndarray, reach: float) -> np.ndarray:
    """Quantiles of the nearest cells, mostly of those within ``reach``, the nearer the more: the ascending broken line
    in z that comes closest to them on average over the cells, so that their mean and spread are kept."""
    near = np.argsort(away)[: int(np.clip((away < reach).sum(), *NEIGHBOURS))]
    weights = np.maximum(1 - away[near] / (away[near].max() * (1 + 1e-9) + 1e-12), 1e-3)
    order = np.argsort(rest[near])
    values, weights = rest[near][order], weights[order] / weights.sum()
    z = ndtri(np.cumsum(weights) - weights / 2)
    knots = ndtri(QUANTILES)
    steps = np.clip((z[:, None] - knots[:-1]) / np.diff(knots), 0, 1)
    design = np.column_stack((np.ones_like(z), -np.ones_like(z), steps)) * np.sqrt(weights)[:, None]
    found, _ = nnls(design, values * np.sqrt(weights))
    return found[0] - found[1] + np.concatenate(([0.0], np.cumsum(found[2:])))
