"""A layer's cells one by one: the conductances of a chip or those aimed at, which rows of the array they lie in, and
the weight that they add up to."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..device.programming import Draws, program
from ..nn import CrossbarLayer
from ..nn import array as cells_of
from ..nn.array import Chip
from ..nn.tensors import whole

Pair = tuple[Tensor, Tensor]  # conductances g+ and g- [µS]


class Rows(NamedTuple):
    """The array's rows, in their order: group by group, in a group row by row, and each followed by its copies.

    Attributes:
        group, row: which group's weights a row holds, and which of its crossbar rows, (rows,). copy: 0 for the first
            row of an input, 1 for its second, and so on. tile: that the row lies in.
    """

    group: Tensor
    row: Tensor
    copy: Tensor
    tile: Tensor

    @classmethod
    def of(cls, layer: CrossbarLayer) -> "Rows":
        """Of a layer."""
        copies = layer.copies_of_rows().expand(layer.groups, 1, layer.width).reshape(-1).long()
        place = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
        first = copies.cumsum(0) - copies
        row = place % layer.width
        copy = torch.arange(len(place), device=copies.device) - first[place]
        return cls(place // layer.width, row, copy, row // layer.tile_rows())


@torch.no_grad()
def held_of(layer: CrossbarLayer) -> Tensor:
    """What the cells of each weight are to hold together, also where FSDP2 has sharded it."""
    return cells_of.program(layer, whole(layer.weight))


@torch.no_grad()
def cells_at(
    layer: CrossbarLayer, programmed: Tensor, time: float | None, temperature: float | None, seed: int | None
) -> Iterator[Pair]:
    """What the layer's cells are found at, pair by pair of each weight: of the first row of each input, in the weight's
    shape, then of its second one, where it has one, (rows that have it, output channels of a group), and so on.

    Args:
        programmed: :func:`held_of` the layer.
        time: s, None for right after programming. temperature: K. seed: of this layer's cells; None: what they are to
            be programmed to.
    """
    device = layer.crossbar.config.device
    scale = layer.held_scale(torch.float32)
    targets = device.conductance(programmed.float() / scale.clamp(min=1e-30))
    draws = None if seed is None else Draws(seed)

    def found(plus: Tensor, minus: Tensor) -> Pair:
        if draws is None:
            return plus, minus
        first = program(device, plus, draws).after(device, time, temperature)
        return first, program(device, minus, draws).after(device, time, temperature)

    plus, minus = targets
    copies = layer.copies_of_rows().mT[..., 0]
    for _ in range(layer.pairs):
        yield found(plus, minus)
        for already in range(1, int(copies.max()) if layer.copied else 1):
            more = copies > already
            yield found(layer.to_rows(plus).mT[more], layer.to_rows(minus).mT[more])


@torch.no_grad()
def chip_of(layer: CrossbarLayer, programmed: Tensor, cells: Iterable[Pair]) -> Chip:
    """What cells hold, ``w_scale (g+ - g-) / Δg``, averaged over a weight's pairs and added over the copies of its row:
    the layer's weight, times the input scales, in its shape and dtype. And what is added digitally for the layer's
    input offset.

    Args:
        programmed: :func:`held_of` the layer. cells: as :func:`cells_at` gives them.
    """
    differences = (plus - minus for plus, minus in cells)
    held: Tensor | None = None
    for _ in range(layer.pairs):
        found = next(differences)
        if layer.copied:  # of which the scale is that of all together, times their mean
            rows, copies = layer.to_rows(found).mT, layer.copies_of_rows().mT
            for already in range(1, int(copies.max())):
                rows[copies[..., 0] > already] += next(differences)
            found = layer.from_rows((rows / copies).mT)
        held = found if held is None else held.add_(found)
    assert held is not None
    scale, device = layer.held_scale(torch.float32), layer.crossbar.config.device
    held = held.mul_(scale / (device.g_range * layer.pairs)).to(layer.weight.dtype)
    offset = cells_of.offset_output(layer, programmed)[1] if layer.centered else None
    return Chip.of(held, offset, layer)


def to_array(layer: CrossbarLayer, rows: Rows, cells: Sequence[Pair]) -> Tensor:
    """What :func:`cells_at` gives as it lies on the array, (2, rows, columns of a group, pairs): first all g+."""
    found = cells[0][0].new_empty(2, len(rows.row), layer.outputs // layer.groups, layer.pairs)
    copies = len(cells) // layer.pairs
    for i, pair in enumerate(cells):
        for polarity, g in enumerate(pair):
            lies = layer.to_rows(g).mT.flatten(0, 1) if i % copies == 0 else g
            found[polarity, rows.copy == i % copies, :, i // copies] = lies
    return found


def from_array(layer: CrossbarLayer, programmed: Tensor, rows: Rows, found: Tensor) -> Iterator[Pair]:
    """The inverse of :func:`to_array`, in memory as ``programmed``: the order of sums in a product depends on it."""
    for pair in range(layer.pairs):
        for copy in range(int(rows.copy.max()) + 1):
            cells = found[:, rows.copy == copy, :, pair]
            if copy:
                yield cells[0], cells[1]
                continue
            first = (layer.from_rows(g.unflatten(0, (layer.groups, -1)).mT) for g in cells)
            plus, minus = (torch.empty_like(programmed, dtype=g.dtype).copy_(g) for g in first)
            yield plus, minus
