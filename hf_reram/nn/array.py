"""What the cells hold: the weights as they were programmed, as the device's error leaves them in training, or a
chip's."""

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .ops.functions import DriftedWeight, OffsetOutput, Quantize, WeightVariance, clip_weight
from .ops.reference import weight_mean
from .places import Part, parameter_of
from .scalars import BUFFERS, Scalars
from .tensors import is_shard, own_part, whole

if TYPE_CHECKING:
    from .layer import CrossbarLayer


# Of sums that tell whether bits have changed.
PRIME = (1 << 31) - 1

# Weights that tell the power of noise: their sampling error is mostly below a hundredth.
MEASURED = 1 << 16


class Held(NamedTuple):
    """What a forward reads.

    Attributes:
        weight: V as the cells hold it now, of the weight's shape. programmed: V as it was programmed.
        bias: what is added digitally, the layer's bias and W o, (output channels,), or None.
        variance: s² of the weights where it came with sampled drift.
    """

    weight: Tensor
    programmed: Tensor
    bias: Tensor | None
    variance: Tensor | None = None


class Chip(NamedTuple):
    """A layer's cells on a chip.

    Attributes:
        weight: as they are found, of the weight's shape. offset: W o of what was programmed, (output channels,), None
            where the layer is not centered.
        source: what was programmed.
    """

    weight: Tensor
    offset: Tensor | None
    source: "Source"

    @classmethod
    def of(cls, weight: Tensor, offset: Tensor | None, layer: "CrossbarLayer") -> "Chip":
        """Programmed from the layer's weight as it is now."""
        return cls(weight, offset, Source.of(layer))

    def applied(self, fn: Any, layer: "CrossbarLayer", stale: bool) -> "Chip":
        """In another dtype or on another device, as the model is moved while it is deployed; ``stale``: its weight had
        changed before."""
        source = self.source if stale else Source.of(layer)
        return Chip(fn(self.weight), None if self.offset is None else fn(self.offset), source)


class Source(NamedTuple):
    """The tensors that a layer's weight is made of, as they were when it was programmed, and what drives and reads it.

    Attributes:
        tensors: weak references. versions: PyTorch's counts of changes, -1 where there is none. sums: of their bits.
        numbers: the sum of those of calibration. sharded: of this process's parts; FSDP2 has other tensors in a
            forward.
    """

    tensors: tuple[Any, ...]
    versions: tuple[int, ...]
    sums: tuple[Tensor, ...]
    numbers: Tensor
    sharded: bool

    @classmethod
    def of(cls, layer: "CrossbarLayer") -> "Source":
        """Look at them."""
        found = sources(layer)
        return cls(
            tuple(weakref.ref(t) for t in found),
            tuple(-1 if t.is_inference() else t._version for t in found),
            tuple(bit_sum(t) for t in contents(layer)),
            number_sum(layer),
            any(map(is_shard, found)),
        )

    def is_other(self, layer: "CrossbarLayer") -> bool:
        """Whether the layer has other tensors now, or PyTorch knows of a change. It does not know of those of
        ``.data``."""
        if self.sharded or getattr(layer, "_is_replica", False):
            return False
        now = sources(layer)
        if len(now) != len(self.tensors) or any(ref() is not t for ref, t in zip(self.tensors, now)):
            return True
        return any(v != -1 and (t.is_inference() or t._version != v) for v, t in zip(self.versions, now))

    def has_changed(self, layer: "CrossbarLayer") -> bool:
        """The same by each bit of them, and of the numbers of calibration, whatever changed it; a pass over the weight.
        Of a weight that is sharded, by this process's part of it, outside of forwards."""
        if self.is_other(layer):
            return True
        now = [*map(bit_sum, contents(layer)), number_sum(layer)]
        return any(not torch.equal(a.to(b.device), b) for a, b in zip((*self.sums, self.numbers), now))


def sources(layer: "CrossbarLayer") -> list[Tensor]:
    """What a layer's weight is made of: itself, the parameter that it is a part of, or what its parametrization
    computes it from."""
    made = getattr(layer, "parametrizations", None)
    if isinstance(layer, Part):  # none where PEFT has put a sum in its place for a forward
        return [found for found in (parameter_of(layer),) if found is not None]
    return [layer.weight] if made is None or "weight" not in made else list(made["weight"].parameters())


def contents(layer: "CrossbarLayer") -> list[Tensor]:
    """The same, and of a parameter of which the weight is a part, this part alone."""
    return [layer.weight] if isinstance(layer, Part) else sources(layer)


@torch.no_grad()
def number_sum(layer: "CrossbarLayer") -> Tensor:
    """:func:`bit_sum` of a layer's numbers of calibration."""
    return bit_sum(torch.cat([own_part(getattr(layer, name).detach()).flatten() for name in BUFFERS]))


@torch.no_grad()
def bit_sum(t: Tensor) -> Tensor:
    """Numbers of a tensor's bits, which change with any of its elements, with the order of its rows, and with that of
    the elements of a row, (3,): of each row's sum, and of each column's, one weighted by its place."""
    local = own_part(t)
    bits = {1: torch.uint8, 2: torch.int16}.get(local.element_size(), torch.int32)  # in whose sums nothing overflows
    length = max(local.shape[0], 1) if local.dim() else 1
    rows = local.detach().contiguous().reshape(length, -1).view(bits)
    of_rows, of_columns = rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64)
    return torch.stack((of_rows.sum(), _by_place(of_rows), _by_place(of_columns)))


def _by_place(sums: Tensor) -> Tensor:
    """``Σ i s_i``, modulo a prime that keeps it within int64."""
    places = torch.arange(1, len(sums) + 1, device=sums.device) % PRIME
    return (sums % PRIME * places % PRIME).sum()


def hold(layer: "CrossbarLayer", now: Scalars) -> Held:
    """The cells of this forward."""
    if layer.chip is not None:
        return deployed(layer, layer.chip)
    if layer.training and layer.crossbar.current(layer.crossbar_name).sampling is not None:
        return sampled(layer, now)
    return ideal(layer, now)


def ideal(layer: "CrossbarLayer", now: Scalars) -> Held:
    """The weights as they were programmed."""
    programmed, bias = with_bias(layer, program(layer, layer.weight), now)
    return Held(programmed, programmed, bias)


def sampled(layer: "CrossbarLayer", now: Scalars) -> Held:
    """``V + m(V) + s(V) ε``: a draw of the device's retention error, or white noise of its power."""
    programmed, bias = with_bias(layer, program(layer, layer.weight), now)
    state = layer.crossbar
    sampling = state.current(layer.crossbar_name).sampling
    assert sampling is not None
    drifts = sampling.kind == "drift"
    weight = wide(programmed)
    noise = sampling.normal(weight, layer.crossbar_name)
    share = sampling.share
    needed = drifts and state.term is not None and sampling.error is state.error and share is None
    scale, copies = layer.row_scale(weight.dtype)
    if drifts:
        error = sampling.error.averaged(now.pairs)
        mean = error.means[0]
        tables: Any = error.spread(weight), None if mean.is_zero else mean.table(weight)
    else:
        tables = torch.eye(2, 1, dtype=weight.dtype, device=weight.device) * layer.white_noise_std(), None
    if share is not None:
        tables = [table if table is None else table * share for table in tables]
    drifted, variance = DriftedWeight.apply(weight, scale, noise, *tables, needed, copies)
    return Held(drifted.to(programmed.dtype), programmed, bias, variance)


def deployed(layer: "CrossbarLayer", chip: Chip) -> Held:
    """A chip's cells as they are found.

    Raises:
        RuntimeError: the layer's weight has changed since it was programmed.
    """
    if not torch.compiler.is_compiling() and chip.source.is_other(layer):
        raise RuntimeError(
            f"the weight of layer {layer.crossbar_name!r} has changed since it was programmed, or is another tensor: "
            "deploy the model anew"
        )
    if chip.weight.device != layer.weight.device:  # a replica of nn.DataParallel
        chip = chip.applied(lambda t: t.to(layer.weight.device), layer, True)
    if chip.source.sharded and chip.weight.dtype != layer.weight.dtype:  # FSDP2's mixed precision, in forwards alone
        chip = chip.applied(lambda t: t.to(layer.weight.dtype), layer, True)
    bias = layer.bias if chip.offset is None else chip.offset if layer.bias is None else layer.bias + chip.offset
    return Held(chip.weight, chip.weight, bias)


def cell_weight(layer: "CrossbarLayer", weight: Tensor) -> Tensor:
    """``V = W · a``, what the cells of each weight are to hold together."""
    return weight * layer.along_inputs(layer.input_scale).to(weight.dtype) if layer.equalized else weight


def program(layer: "CrossbarLayer", weight: Tensor) -> Tensor:
    """``clamp(W · a, ±w_scale)``, at the nearest of the cells' levels: what they can hold of a weight. The one place
    where a forward clips weights."""
    held, levels = clip_weight(cell_weight(layer, weight), *layer.row_scale()), layer.error.levels
    return (
        Quantize.apply(held, layer.held_scale(torch.float32) / (levels - 1), levels - 1, None, False)
        if levels
        else held
    )


def with_bias(layer: "CrossbarLayer", programmed: Tensor, now: Scalars) -> tuple[Tensor, Tensor | None]:
    """What was programmed, and what is added digitally: the layer's bias and ``W o``, which make up for the input's
    offset."""
    if not now.centered:
        return programmed, layer.bias
    programmed, offset = offset_output(layer, programmed)
    return programmed, offset if layer.bias is None else layer.bias + offset


def offset_output(layer: "CrossbarLayer", programmed: Tensor) -> tuple[Tensor, Tensor]:
    """What was programmed, and ``W o = V (o / a)`` of it, (output channels,)."""
    rows = layer.driven_offset().to(programmed.dtype).view(layer.groups, -1).repeat_interleave(layer.area, 1)
    held, offset = OffsetOutput.apply(layer.to_rows(programmed), rows)
    return layer.from_rows(held), offset


@torch.no_grad()
def clipped_share(layer: "CrossbarLayer", scale: Tensor | None = None) -> float:
    """Share of the weights beyond what the cells can hold, or could with another ``scale`` of weight_scale's shape."""
    weight = whole(layer.weight)
    edge = layer.held_scale(scale=scale) * (1 + 4 * torch.finfo(weight.dtype).eps)  # at the edge is within
    return float(torch.count_nonzero(cell_weight(layer, weight).abs() > edge)) / max(weight.numel(), 1)


@torch.no_grad()
def white_noise_std(layer: "CrossbarLayer") -> Tensor:
    """Spread of a cell, in units of weight_scale, of white noise with the power of the device's error over the layer's
    weights, of large ones over a part of them, since each step asks: ``Σ E ΔW² / Σ w_scale²``; without dimensions,
    where the weights are, so that nobody waits for it."""
    whole_weight, error = program(layer, layer.weight), layer.error
    rows = layer.to_rows(whole_weight)
    every = max(1, rows.numel() // MEASURED)
    outputs = min(every, max(1, rows.shape[1] // 64))  # which mostly have scales of their own, and so are much alike
    inputs = min(every // outputs, max(1, rows.shape[2] // 64))
    part = slice(None), slice(None, None, outputs), slice(None, None, inputs)
    weight = wide(rows[part]).contiguous()
    scale = layer.to_rows(layer.held_scale(torch.float32).expand(whole_weight.shape))[part]
    copies = layer.copies_of_rows()[part].to(weight.dtype) if layer.copied else weight.new_ones(())
    power = (WeightVariance.apply(weight, scale, error.spread(weight)) / copies).sum(dtype=torch.float64)
    for mean in error.shifts:
        shift = weight_mean(weight, scale, mean.table(weight))
        power = power + shift.square().sum(dtype=torch.float64) / len(error.means)
    unit = (scale.square() / copies).sum(dtype=torch.float64)
    return torch.where(unit > 0, power / unit, 0.0).sqrt()


def wide(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision values would overflow or vanish."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
