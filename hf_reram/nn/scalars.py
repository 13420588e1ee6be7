"""What calibration left in a crossbar's buffers, as Python numbers; in compiled code, what follows a training as
tensors."""

import zlib
from operator import is_
from typing import Any, NamedTuple

import torch

from ..config import SMALLEST_SHRINK
from .tensors import whole

# Of each input channel.
OF_CHANNELS = ("input_offset", "input_scale", "row_copies")

# Results of calibration, kept beside the weight and saved with it, always in float32. All have one element except
# weight_scale and those of channels; input_range 0 means not calibrated, each batch then spans its own range.
BUFFERS = (
    "input_range",
    "range_shrink",
    "gain",
    "adc_range",
    "weight_scale",
    "input_floor",
    "pairs_per_weight",
    "per_token",
    *OF_CHANNELS,
)

MAX_PAIRS = 64  # of a weight, and rows of one input

# An optimizer may take a range that is learned below 0, which then is this, in training and later: 0 says that a layer
# is not calibrated.
SMALLEST_RANGE = 1e-12

_LARGEST = torch.finfo(torch.float32).max
_POSITIVE = torch.finfo(torch.float32).tiny

# What calibration may leave, both ends included; other numbers in a checkpoint are no calibration's.
LIMITS = {
    "input_range": (0.0, _LARGEST),
    "range_shrink": (SMALLEST_SHRINK * (1 - 1e-7), 1.0),  # as float32 has it
    "gain": (0.0, _LARGEST),
    "adc_range": (0.0, _LARGEST),
    "weight_scale": (0.0, _LARGEST),
    "input_floor": (-1.0, 0.0),
    "pairs_per_weight": (1, MAX_PAIRS),
    "per_token": (0, 1),
    "input_offset": (-_LARGEST, _LARGEST),
    "input_scale": (_POSITIVE, _LARGEST),
    "row_copies": (1, MAX_PAIRS),
}

# Those that are read as numbers.
READ = tuple(name for name in BUFFERS if name != "weight_scale")


class Scalars(NamedTuple):
    """See the buffers of :class:`.layer.CrossbarLayer`.

    Attributes:
        input_range, gain (times b), input_floor: floats; in compiled code tensors without dimensions.
        mark: a number that stands for offset and scales, 0 without them; in compiled code 0.
        pairs: cell pairs a weight. calibrated, adc_calibrated: whether there is an input range, and one of the ADC.
        centered, equalized, copied: whether the layer has an input offset, input scales, and inputs with several rows.
        per_token: whether each token's (image's) largest magnitude is its input range.
    """

    input_range: Any
    gain: Any
    input_floor: Any
    mark: int
    b: float
    pairs: int
    calibrated: bool
    adc_calibrated: bool
    centered: bool
    equalized: bool
    copied: bool
    per_token: bool


FOLLOWING = Scalars._fields.index("b")  # so many of them, the first, follow a training


def check_numbers(layer: Any, given: dict[str, torch.Tensor]) -> None:
    """Look at numbers of calibration that were, or will be, loaded into a layer.

    Args:
        given: by the buffers' names.

    Raises:
        ValueError: NaN, infinite, or outside of :data:`LIMITS`; names the layer, the number and what is allowed.
    """
    for name, tensor in given.items():
        low, high = LIMITS[name]
        if name in layer._parameters:  # learned: an optimizer may take it anywhere
            low = -high
        if tensor.is_meta:
            continue
        values = whole(tensor.detach()).float()
        good = (values >= low) & (values <= high)  # NaN is not
        if integer := isinstance(low, int):
            good &= values == values.round()
        if not good.all():
            allowed = f"{'an integer' if integer else 'a number'} from {low:g} to {high:g}"
            raise ValueError(
                f"layer {layer.crossbar_name!r}: {name}={float(values[~good][0]):g} in the checkpoint: allowed is "
                f"{'a finite number' if low == -_LARGEST else allowed}"
            )


def to_text(now: Scalars) -> str:
    """What of them is constant in a training, for :func:`compiled_scalars`."""
    return " ".join(map(repr, now[FOLLOWING:]))


def compiled_scalars(layer: Any, text: str) -> Scalars:
    """The numbers in compiled code. What follows a training is read from the buffers by the graph, which is the same
    for all of it. The rest are its constants, as text: floats become variables of a graph once it has seen that they
    differ, as after another calibration, and the coefficients of a polynomial cannot be made of variables."""
    b, pairs, *flags = text.split()
    span, gain, floor = (getattr(layer, name).detach().reshape(()) for name in ("input_range", "gain", "input_floor"))
    return Scalars(span, gain, floor, 0, float(b), int(pairs), *(flag == "True" for flag in flags))


def versions(layer: Any) -> tuple[list, list]:
    """What changes whenever a buffer does. It is asked in each forward, so modules' slow attributes are avoided.

    An input range that is learned changes in every step, and to read it is to wait for the GPU: training, which needs
    no number of it, does not look.
    """
    buffers = layer._buffers
    tensors: list[Any] = []
    counts: list[int] = []
    for name in READ:
        t, unread = buffers.get(name), False
        if t is None:
            t, unread = layer._parameters[name], layer.training
        tensors.append(t)
        counts.append(-1 if unread or t.is_inference() else t._version)
    return tensors, counts


def same_versions(a: Any, b: Any) -> bool:
    """Whether two of :func:`versions` are of the same tensors, unchanged."""
    return a is not None and a[1] == b[1] and all(map(is_, a[0], b[0]))


def read_scalars(layer: Any) -> Scalars:
    """Look into the buffers."""
    span, shrink, gain, full_scale, floor, pairs, per_token = (
        float(whole(getattr(layer, name).detach()).item()) for name in READ if name not in OF_CHANNELS
    )
    if span < 0:
        span = SMALLEST_RANGE
    offset, scale, copies = (getattr(layer, name).detach().float().cpu() for name in OF_CHANNELS)
    centered, equalized, copied = bool(offset.any()), bool((scale != 1).any()), bool((copies != 1).any())
    mark = zlib.crc32(torch.cat((offset, scale)).numpy().tobytes()) if centered or equalized else 0
    b = layer.crossbar.config.device.b(shrink)
    flags = span > 0, full_scale > 0, centered, equalized, copied, per_token > 0
    return Scalars(span, gain, floor, mark, b, max(1, round(pairs)), *flags)
