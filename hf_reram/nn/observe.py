"""What training forwards see of the inputs of layers, so that their numbers can follow the training."""

import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..device.iv import LINEAR_B
from .converter import conversion_errors
from .forward import runs_again
from .places import is_trained
from .scalars import SMALLEST_RANGE, Scalars

if TYPE_CHECKING:
    from .layer import CrossbarLayer

# Elements of an input that are looked at: all of them would cost a tenth of a step, these a fortieth; and of a tile's
# currents, for each of a few full scales around the ADC's.
ELEMENTS, CURRENTS = 1 << 19, 1 << 16
FULL_SCALES = (0.7, 0.84, 1.0, 1.19, 1.41, 2.0)


class Seen(NamedTuple):
    """Of an input x, and of ``u = (x - o) / a``, which the DACs got of it.

    Attributes:
        sums: (5 + input channels,) in double precision: Σ w; Σ of u sinh(b u) and of sinh²(b u), with u in units of the
            input range; the number of u beyond the range, and of all; Σ w x of each channel, with w of
            :func:`input_weights`, 1 for pixels.
        largest: (2,): the percentile ``input_percentile`` of |u|, and -u at its lowest. Where each token has its own
            range, in units of that.

    Of a look at what is not finite, as before a step that is skipped, nothing is kept: zeros, and -inf.
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
        clamped, clamped_before: share of the inputs beyond the range at the last look, and at the one before, by layer.
    """

    steps: int = 0
    looks: bool = True
    settled: bool = False
    seen: dict[str, Seen] = field(default_factory=dict)
    conversions: dict[str, Tensor] = field(default_factory=dict)
    rms: dict[str, Tensor] = field(default_factory=dict)
    clamped: dict[str, Tensor] = field(default_factory=dict)
    clamped_before: dict[str, Tensor] = field(default_factory=dict)

    def forget(self, name: str) -> None:
        """What was seen of a layer whose numbers are others now."""
        for found in (self.seen, self.conversions, self.rms):
            found.pop(name, None)


def looks(layer: "CrossbarLayer", x: Tensor | None = None) -> bool:
    """Whether a layer's forward looks: one in training and in eager mode, of a layer that is no chip and is trained
    itself, or whose input ``x`` comes from what is."""
    if torch.compiler.is_compiling():  # first, so that no graph depends on the rest
        return False
    following = layer.crossbar.following
    if following is None or not following.looks or not layer.training or layer.chip is not None or runs_again():
        return False
    return is_trained(layer) or (x is not None and x.requires_grad)


class _Last:
    """The input that was looked at last: query, key and value read the same."""

    x: Any = None
    key: tuple = ()
    seen: Any = None


@torch.no_grad()
def observe(layer: "CrossbarLayer", x: Tensor, now: Scalars) -> None:
    """Look at some rows of an input, as many as are cheap; of a layer that is not calibrated, at nothing."""
    following, name = layer.crossbar.following, layer.crossbar_name
    assert following is not None
    if not now.calibrated:
        return
    span: Any = now.input_range
    of_span = span
    if isinstance(layer.input_range, nn.Parameter):  # of which no number is read in training
        span = layer.input_range.detach().clamp(min=SMALLEST_RANGE)
        of_span = id(layer), layer.input_range._version
    key = (now.per_token, now.mark, of_span, now.b, layer.channel_dim, x._version)
    if _Last.x is None or _Last.x() is not x or _Last.key != key:
        _Last.x, _Last.key, _Last.seen = weakref.ref(x), key, _look(layer, x, now, span, following.steps)
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
    errors = torch.where(torch.isfinite(errors).all(), errors, 0.0)
    following.conversions[name] = following.conversions.get(name, 0.0) + errors


def _look(layer: "CrossbarLayer", x: Tensor, now: Scalars, span: Any, turn: int) -> Seen:
    rows, keep, images = _rows(layer, x, turn)
    u = rows - layer.input_offset if now.centered else rows
    u = u / layer.input_scale if now.equalized else u
    weights = input_weights(rows) if images is None else rows.new_ones(len(rows), 1)
    if keep is not None:
        rows, u, weights = rows * keep, u * keep, weights * keep
    size = u.abs()
    largest = size.amax(1)  # of each row: of the few largest elements hardly two are in one
    if now.per_token:
        peaks = largest if images is None else largest.new_zeros(4).scatter_reduce(0, images, largest, "amax")[images]
        u = u / peaks[:, None].clamp(min=torch.finfo(u.dtype).tiny)
        size, largest = u.abs(), largest.sign()
    number = round(size.numel() * (1 - layer.crossbar.config.input_percentile / 100))
    if number > len(largest) // 8:
        largest = size.flatten()
    top = largest.topk(max(1, number)).values[-1]
    beyond = torch.stack(((size > span).sum(), torch.full((), size.numel(), dtype=torch.long, device=size.device)))
    sample = (u.flatten()[:: max(1, u.numel() // 8192)] / span).clamp(-1, 1).double()
    bent = sample if now.b < LINEAR_B else torch.sinh(now.b * sample)
    sums = torch.stack((weights.double().sum(), (sample * bent).sum(), bent.square().sum()))
    weighted = (rows * weights).double().sum(0)
    sums, extremes = torch.cat((sums, beyond, weighted)), torch.stack((top, -u.amin()))
    finite = torch.isfinite(sums).all() & torch.isfinite(extremes).all()
    return Seen(torch.where(finite, sums, 0.0), torch.where(finite, extremes, -math.inf))


def input_weights(x: Tensor) -> Tensor:
    """How much each token counts in the mean that is subtracted, ``1 / |x|``, (tokens, 1): rare huge ones (massive
    activations) then do not decide for all. It is a step from 0 towards the geometric median (Weiszfeld, Tohoku Math.
    J. 43, 355, 1937).

    Args:
        x: (tokens, channels).
    """
    size = x.square().sum(1, keepdim=True).sqrt()
    return torch.where(size > 0, 1 / size.clamp(min=1e-30), 0.0)


def _rows(layer: "CrossbarLayer", x: Tensor, turn: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Vectors over input channels, (rows, channels), others at each turn; 1 for those that are no padding; and of
    which of at most four images they are, where they are pixels."""
    keep = layer.crossbar.forward.padding.keep(x) if layer.channel_dim == -1 else None
    rows, images = layer.examples(x.detach()), None
    if layer.reads_windows:
        rows = layer.pad(rows[turn % len(rows) :][:4]).movedim(layer.channel_dim, -1)
        images = torch.arange(len(rows), device=x.device).repeat_interleave(rows[0].numel() // rows.shape[-1])
        rows = rows.flatten(0, -2)
    step = max(1, rows.numel() // ELEMENTS)
    part = slice(turn % step, None, step)
    return (
        rows[part].float(),
        None if keep is None else keep[part, None],
        None if images is None else images[part],
    )
