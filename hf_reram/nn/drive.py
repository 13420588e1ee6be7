"""The DACs and the I-V curve: what of an input reaches the array, ``phi((x - o) / a)``."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import dac_grid
from ..device.iv import LINEAR_B
from .forward import rows_kept, runs_again, same_mask
from .observe import looks, observe
from .ops import reference
from .ops.functions import RowSinh, ShrunkSinh
from .places import is_trained
from .scalars import SMALLEST_RANGE, Scalars
from .sharing import shared

if TYPE_CHECKING:
    from .layer import CrossbarLayer


@dataclass
class Driven:
    """An input as it meets the array.

    Attributes:
        s: phi, of the input's shape, padded where the layer is centered (``padded``).
        span: the input range: a float, a tensor where it is learned, or (..., 1) of each token (..., 1, 1, 1 of each
            image).
        keep: k, 0 at padding and 1 elsewhere, (tokens,); None where unknown, for windows, or where no term is computed.
        power: ``Σ_n k_n s_n²`` over examples n, of an example's shape; None where no term needs it.
    """

    s: Tensor
    span: Tensor | float
    padded: bool
    keep: Tensor | None = None
    power: Tensor | None = None


def drive(layer: "CrossbarLayer", x: Tensor, now: Scalars) -> Driven:
    """Center, scale, clamp to the input range, convert, and bend: ``phi = span · gain/b · sinh(b u)``."""
    span = 1.0 if now.per_token else input_range(layer, x, now)
    lowest = now.input_floor.double() if isinstance(now.input_floor, Tensor) else now.input_floor
    levels, floor = dac_grid(layer.crossbar.config.dac_bits, lowest)
    if looks(layer, x):
        observe(layer, x, now)
    gain = now.gain if now.b < LINEAR_B else now.gain / now.b
    state = layer.crossbar
    accounts = layer.training and bool(state.term or state.measures)
    powered = layer.training and state.physics.term_reads_input
    mask, keep = tokens_kept(layer, x) if accounts and not layer.reads_windows else (None, None)
    if isinstance(span, Tensor):
        s, _, power = _sinh(layer, x, span, levels, gain, floor, now, powered, keep)
        return Driven(s, span, now.centered, keep, power)
    factor = span * gain

    def compute():
        return _sinh(layer, x, span, levels, factor, floor, now, powered, keep)

    geometry = (type(layer), *layer.geometry()) if now.mark else ()
    key = (span, now.per_token, now.b, levels, floor, factor, now.mark, geometry, layer.channel_dim)
    # Of a part of the model by itself nothing says when its inputs' memory may change.
    s, span, power = shared(x, key, mask, powered, compute) if state.running is not None else compute()
    return Driven(s, span, now.centered, keep, power)


def tokens_kept(layer: "CrossbarLayer", x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The padding mask of the input, and 1 for each token that is no padding, 0 for the others; the latter as it was
    where the layer runs again in a backward.

    Raises:
        RuntimeError: it runs again, and ran with several masks.
    """
    name = layer.crossbar_name
    forward = layer.crossbar.current(name)
    if not runs_again():
        mask = forward.padding.mask_of(x)
        keep = rows_kept(mask, x)
        if not torch.compiler.is_compiling():
            forward.note_kept(name, mask, keep)
        return mask, keep
    masks, keeps = forward.kept.get(name, ([], []))
    if not all(same_mask(keep, keeps[0]) for keep in keeps):
        raise RuntimeError(
            f"gradient checkpointing runs layer {name!r} again, which ran {len(keeps)} times in one forward with "
            "attention masks of its own each: call the model once for each, or switch gradient checkpointing off"
        )
    return (masks[0], keeps[0]) if keeps else (None, None)


def input_range(layer: "CrossbarLayer", x: Tensor, now: Scalars) -> Any:
    """A float, or a tensor where it is learned and in compiled code; that of the batch where the layer is not
    calibrated.

    Raises:
        ValueError: not calibrated and ``x`` holds NaN.
    """
    if isinstance(layer.input_range, nn.Parameter) and now.calibrated:
        return layer.input_range.clamp(min=SMALLEST_RANGE).reshape(())  # which leaves x its dtype
    if now.calibrated:
        return now.input_range
    if not x.numel():
        return 1.0
    if torch.compiler.is_compiling():  # no graph may depend on what x holds
        return x.detach().abs().amax().float().mul(1 + 1e-5).clamp(min=1e-12)
    span = float(x.detach().abs().max()) * (1 + 1e-5)
    if math.isnan(span):
        raise ValueError(f"the input of layer {layer.crossbar_name!r} contains NaN")
    return span or 1.0


def center(layer: "CrossbarLayer", x: Tensor, offset: Tensor) -> Tensor:
    """``x - o``, padded. Padding is part of the input, so it is centered too."""
    return layer.pad(x) - layer.over_channels(offset).to(x.dtype)


def equalize(layer: "CrossbarLayer", x: Tensor, scale: Tensor) -> Tensor:
    """``x / a``."""
    return x / layer.over_channels(scale).to(x.dtype)


def to_dacs(layer: "CrossbarLayer", x: Tensor, now: Scalars) -> Tensor:
    """``(x - o) / a``, as the DACs get it."""
    if not now.equalized:
        return center(layer, x, layer.input_offset) if now.centered else x
    factor = layer.over_channels(1 / layer.input_scale).to(x.dtype)
    if not now.centered:
        return x * factor
    shift = layer.over_channels(-layer.driven_offset()).to(x.dtype)
    return torch.addcmul(shift, layer.pad(x), factor)  # one pass


def _sinh(
    layer: "CrossbarLayer",
    x: Tensor,
    span: Any,
    levels: int,
    gain: float,
    floor: float,
    now: Scalars,
    powered: bool,
    keep: Tensor | None,
) -> tuple[Tensor, Any, Tensor | None]:
    """``gain · sinh(b u)``, times the input range where that is learned or each token's own; the range; the power."""
    offset = None
    if layer.channel_dim == -1 and now.centered and not now.equalized:
        offset = layer.input_offset.to(x.dtype)  # in the same pass
    else:
        x = to_dacs(layer, x, now)
    frozen = not is_trained(layer)
    if now.per_token:
        rows = layer.examples(x)
        s, peak, *power = RowSinh.apply(
            rows.flatten(1), now.b, levels, gain, floor, offset, True, frozen, powered, keep
        )
        ends = [*x.shape[: layer.channel_dim], *[1] * -layer.channel_dim]
        return s.view(x.shape), peak.view(ends), power[0].view(rows.shape[1:]) if powered else None
    curve = (span, now.b, levels, gain, floor, offset, True, frozen)
    if powered:
        s, power = ShrunkSinh.apply(x, *curve, layer.channel_dim, keep)
        return s, span, power
    return ShrunkSinh.apply(x, *curve), span, None


def row_power(layer: "CrossbarLayer", driven: Driven) -> Tensor:
    """``Σ_n k_n s_n²`` of each crossbar row over all vectors that met it, (groups, rows)."""
    power = driven.power if driven.power is not None else reference.row_power(layer.examples(driven.s), driven.keep)
    # A window's sum of squares needs no windows of the whole batch.
    rows = power[None] if driven.padded else layer.pad(power[None])
    return layer.windows(rows).sum(0).view(layer.groups, -1)
