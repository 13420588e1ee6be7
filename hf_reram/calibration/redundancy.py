"""Which weights get the cells on top: those where a cell takes most off what the chips' spread does to the predictions.

An input channel that drives k rows, a kth of it each, meets k cells for each of its weights, whose independent errors
average out: their power is divided by k. Few channels have most of the effect. Of a language model's, the few that
massive activations go through: on SmolLM2-135M (cmo-hfox-ibm, ten years) 2 % of the channels of one layer have 99 % of
its effect, and 5 % more cells, channel by channel, leave as much of the model's as 50 % that whole layers get. Where
tiles have a size, their rows are all taken, and whole layers get several pairs, in columns of their own.
"""

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..config import ReRAMConfig
from ..model.sharding import gathered
from ..nn.array import program
from ..nn.scalars import MAX_PAIRS
from ..nn.terms import variance
from .scales import by_array, weighted_inputs
from .statistics import LayerStatistics


def allot(errors: Sequence[float], cells: Sequence[int], spare: float) -> list[int]:
    """Copies k of layers or channels that make ``Σ errors / k`` small with ``Σ cells (k - 1) <= spare``, 1 to
    :data:`MAX_PAIRS` each.

    One more copy at a time goes to where it takes off most per cell. Each further one takes off less, so no other
    choice of as many cells does better; what is left over at the end is less than the next copy's.

    Args:
        errors: of each with one copy, such as :func:`.spread.spread_effects`.
        cells: of one copy.
    """
    copies = [1] * len(cells)

    def step(place: int) -> tuple[float, int]:
        k = copies[place]
        return -errors[place] / (k * (k + 1) * cells[place]), place

    heap = [step(place) for place in range(len(cells)) if cells[place] and errors[place] > 0]
    heapq.heapify(heap)
    while heap:
        _, place = heapq.heappop(heap)
        if cells[place] > spare:
            continue
        spare -= cells[place]
        copies[place] += 1
        if copies[place] < MAX_PAIRS:
            heapq.heappush(heap, step(place))
    return copies


def by_input(statistics: dict[str, LayerStatistics], leaders: dict[str, str]) -> list[list[LayerStatistics]]:
    """Layers that read one input, which is scaled once for all of them, or whose weights lie on one array; those that
    calibration data reached.

    Args:
        leaders: of each layer the first one that reads the same input, by their names.
    """
    group_of = {name: {name} for name, found in statistics.items() if found.samples is not None}
    for array in by_array(statistics):
        _join(group_of, [found.name for found in array])
    for name in group_of:
        _join(group_of, [name, leaders[name]])
    groups = {id(group): group for group in group_of.values()}
    return [[statistics[name] for name in statistics if name in group] for group in groups.values()]


def _join(group_of: dict[str, set[str]], names: Iterable[str]) -> None:
    groups = [group_of[name] for name in names if name in group_of]
    for group in groups[1:]:
        if group is not groups[0]:
            groups[0] |= group
            group_of |= dict.fromkeys(group, groups[0])


def copy_rows(
    statistics: dict[str, LayerStatistics], leaders: dict[str, str], config: ReRAMConfig, effects: dict[str, Tensor]
) -> None:
    """Give each input channel its rows.

    Args:
        effects: of the spread of each layer's cells on what the model predicts, by layer name, for each input channel
            (:func:`.spread.spread_effects`); where it is empty, the shares of the layers' outputs' power that the
            spread has are taken.
    """
    groups = by_input(statistics, leaders)
    errors: list[Tensor] = []
    cells: list[int] = []
    for group in groups:
        errors.append(sum(_effect(found, effects) for found in group))  # type: ignore[arg-type]
        own = by_array({found.name: found for found in group})
        cells.append(sum(a[0].layer.weight.numel() // max(a[0].layer.inputs, 1) for a in own))
    sizes = [len(error) for error in errors]
    arrays = by_array(statistics)
    kept = [array for array in arrays if all(found.samples is None for found in array)]
    spare = config.redundancy * _cells(arrays) - sum(a[0].layer.cells // 2 - a[0].layer.weight.numel() for a in kept)
    per_channel = [count for count, size in zip(cells, sizes) for _ in range(size)]
    copies = torch.tensor(allot(torch.cat(errors).tolist() if errors else [], per_channel, spare), dtype=torch.float32)
    for group, of_group in zip(groups, copies.split(sizes)):
        for found in group:
            found.layer.row_copies.copy_(of_group)
            found.layer.forget_white_noise()


def spread_pairs(statistics: dict[str, LayerStatistics], config: ReRAMConfig, effects: dict[str, Tensor]) -> None:
    """Give the arrays their pairs per weight; ``effects`` as for :func:`copy_rows`."""
    held = by_array(statistics)
    errors = [sum(float(_effect(found, effects).sum()) for found in array) for array in held]
    cells = [array[0].layer.weight.numel() for array in held]
    for array, pairs in zip(held, allot(errors, cells, config.redundancy * _cells(held))):
        for found in array:
            found.layer.pairs_per_weight.fill_(pairs)
            found.layer.forget_white_noise()


def _cells(held: list[list[LayerStatistics]]) -> int:
    return sum(array[0].layer.weight.numel() for array in held)


@torch.no_grad()
def _effect(found: LayerStatistics, effects: dict[str, Tensor]) -> Tensor:
    """Of a layer's spread for each input channel, (input channels,), in double precision."""
    layer = found.layer
    if effects:
        return effects[found.name]
    if found.samples is None:
        return torch.zeros(layer.inputs, dtype=torch.float64)
    with gathered([layer]):
        power = weighted_inputs(found)[1].power()
        held = program(layer, layer.weight).float()
        of_rows = (layer.to_rows(variance(layer, held, layer.error)) * power).sum(1)
    return of_rows.double().view(layer.inputs, layer.area).sum(1).cpu()
