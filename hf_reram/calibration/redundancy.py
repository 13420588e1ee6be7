"""Which layers get the cells on top: those where a cell takes most off what the chips' spread does to the predictions.

Averaging k pairs divides the power of the cells' independent errors by k. Layers differ in their error per cell by
orders of magnitude: a stem or a depthwise convolution has few cells, and disturbs the model as much as a layer of a
hundred times as many. Measured on EfficientNet-Lite0, cmo-hfox-ibm, ten years: recipes/README.md.
"""

import heapq
from collections.abc import Sequence

from ..nn.scalars import MAX_PAIRS


def allot_pairs(errors: Sequence[float], cells: Sequence[int], spare: float) -> list[int]:
    """Pairs per weight k that make ``Σ errors_l / k_l`` small with ``Σ cells_l (k_l - 1) <= spare``, 1 to
    :data:`MAX_PAIRS` each.

    One more pair at a time goes to where it takes off most per cell. Each further one takes off less, so no other
    choice of as many cells does better; what is left over at the end is less than the next layer's pair.

    Args:
        errors: of each layer with one pair a weight, such as :func:`.sensitivity.spread_effects`.
        cells: with one pair a weight.
    """
    pairs = [1] * len(cells)

    def step(layer: int) -> tuple[float, int]:
        k = pairs[layer]
        return -errors[layer] / (k * (k + 1) * cells[layer]), layer

    heap = [step(layer) for layer in range(len(cells)) if cells[layer] and errors[layer] > 0]
    heapq.heapify(heap)
    while heap:
        _, layer = heapq.heappop(heap)
        if cells[layer] > spare:
            continue
        spare -= cells[layer]
        pairs[layer] += 1
        if pairs[layer] < MAX_PAIRS:
            heapq.heappush(heap, step(layer))
    return pairs
