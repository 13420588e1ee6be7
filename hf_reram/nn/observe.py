"""What training forwards see of the inputs of layers, so that their numbers can follow the training."""

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..device.iv import LINEAR_B
from .converter import conversion_errors
from .forward import runs_again
from .scalars import Scalars

if TYPE_CHECKING:
    from .layer import CrossbarLayer

# Elements of an input that are looked at: all of them would cost a tenth of a step, these a fortieth; and of a tile's
# currents, for each of a few full scales around the ADC's.
ELEMENTS, CURRENTS = 1 << 19, 1 << 16
FULL_SCALES = (0.7, 0.84, 1.0, 1.19, 1.41, 2.0)


class Seen(NamedTuple):
    """Of an input x, and of ``u = (x - o) / a``, which the DACs got of it.

    Attributes:
        sums: (3 + input channels,) in double precision: rows; Σ of u sinh(b u) and of sinh²(b u), with u in units of
            the input range; Σ x of each channel.
        largest: (3,): the percentile ``input_percentile`` of |u|; -u at its lowest; the share of u beyond the range.
    """

    sums: Tensor
    largest: Tensor


@dataclass
class Following:
    """How far layers have followed a training.

    Attributes:
        steps: of the optimizer, done. looks: whether forwards look at inputs now. settled: numbers stay as they are.
        seen: since the last step, by layer. conversions: by layer, the errors of its ADCs with full scales that are
            :data:`FULL_SCALES` times what they are.
        rms: of the weights when their scales last followed, by layer, of weight_scale's shape.
        clamped: share of the inputs beyond the range at the last look, by layer.
    """

    steps: int = 0
    looks: bool = True
    settled: bool = False
    seen: dict[str, Seen] = field(default_factory=dict)
    conversions: dict[str, Tensor] = field(default_factory=dict)
    rms: dict[str, Tensor] = field(default_factory=dict)
    clamped: dict[str, Tensor] = field(default_factory=dict)


def looks(layer: "CrossbarLayer") -> bool:
    """Whether a layer's forward looks: one in training, of a layer that is trained itself, in eager mode."""
    if torch.compiler.is_compiling():  # first, so that no graph depends on the rest
        return False
    following = layer.crossbar.following
    return (
        following is not None and following.looks and layer.training and layer.weight.requires_grad and not runs_again()
    )


class _Last:
    """The input that was looked at last: query, key and value read the same."""

    x: Any = None
    key: tuple = ()
    seen: Any = None


@torch.no_grad()
def observe(layer: "CrossbarLayer", x: Tensor, now: Scalars) -> None:
    """Look at some rows of an input, as many as are cheap; of a layer that is not calibrated or learns its range, at
    nothing."""
    following, name = layer.crossbar.following, layer.crossbar_name
    assert following is not None
    if now.input_range <= 0 or isinstance(layer.input_range, nn.Parameter):
        return
    key = (now.mark, now.input_range, now.b, layer.channel_dim, x._version)
    if _Last.x is None or _Last.x() is not x or _Last.key != key:
        _Last.x, _Last.key, _Last.seen = weakref.ref(x), key, _look(layer, x, now, following.steps)
    seen, before = _Last.seen, following.seen.get(name)
    if before is not None:
        seen = Seen(before.sums + seen.sums, torch.maximum(before.largest, seen.largest))
    following.seen[name] = seen


@torch.no_grad()
def observe_conversion(layer: "CrossbarLayer", current: Tensor, unit: Tensor, levels: int) -> None:
    """Look at some of a tile's currents before they are converted, each token's relative to its own power, as they
    counted in calibration."""
    following, name = layer.crossbar.following, layer.crossbar_name
    assert following is not None
    rows, units = layer.examples(current.detach()), layer.examples(unit.detach().expand(current.shape))
    step = min(max(1, rows.numel() // CURRENTS), max(len(rows) // 2, 1))
    columns = max(1, rows[::step].numel() // CURRENTS)  # of a vocabulary
    units = units[following.steps % step :: step, ::columns].float()
    rows = rows[following.steps % step :: step, ::columns].float() / units.clamp(min=1e-30)
    weights = units.square()
    if not layer.reads_windows:
        weights = weights / (weights * rows.square()).sum(1, keepdim=True).clamp(min=1e-30)
    full_scales = [layer.adc_range * share for share in FULL_SCALES]
    errors = conversion_errors(rows, weights, full_scales, levels)
    following.conversions[name] = following.conversions.get(name, 0.0) + errors


def _look(layer: "CrossbarLayer", x: Tensor, now: Scalars, turn: int) -> Seen:
    rows, keep = _rows(layer, x, turn)
    u = rows - layer.input_offset if now.centered else rows
    u = u / layer.input_scale if now.equalized else u
    if keep is not None:
        rows, u = rows * keep, u * keep
    count = rows.new_tensor(float(len(rows))) if keep is None else keep.sum()
    size, span = u.abs(), now.input_range
    largest = size.amax(1)  # of each row: of the few largest elements hardly two are in one
    number = round(size.numel() * (1 - layer.crossbar.config.input_percentile / 100))
    if number > len(largest) // 8:
        largest = size.flatten()
    top = largest.topk(max(1, number)).values[-1]
    beyond = (size > span).float().mean()
    sample = (u.flatten()[:: max(1, u.numel() // 8192)] / span).clamp(-1, 1).double()
    bent = sample if now.b < LINEAR_B else torch.sinh(now.b * sample)
    sums = torch.stack((count.double(), (sample * bent).sum(), bent.square().sum()))
    return Seen(torch.cat((sums, rows.double().sum(0))), torch.stack((top, -u.amin(), beyond)))


def _rows(layer: "CrossbarLayer", x: Tensor, turn: int) -> tuple[Tensor, Tensor | None]:
    """Vectors over input channels, (rows, channels), others at each turn, and 1 for those that are no padding."""
    keep = layer.crossbar.forward.padding.keep(x) if layer.channel_dim == -1 else None
    rows = layer.examples(x.detach())
    if layer.reads_windows:
        rows = layer.pad(rows[turn % len(rows) :][:4]).movedim(layer.channel_dim, -1).flatten(0, -2)
    step = max(1, rows.numel() // ELEMENTS)
    chosen = rows[turn % step :: step].float()
    return chosen, None if keep is None else keep[turn % step :: step, None]
