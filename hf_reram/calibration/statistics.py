"""What calibration keeps of each layer's inputs."""

import math
from typing import Any

import torch
from torch import Tensor

from ..nn import CrossbarLayer
from ..nn.drive import center, equalize
from ..nn.observe import input_weights
from ..nn.tensors import NotFiniteError
from .input_scales import TINY, input_offset, input_scale

# Histogram of |x|, whose bins are the first bits of a float32: 8 of its exponent and 6 of its mantissa resolve a range
# to 1 %.
_BITS = 17  # that are left out
_BINS = 1 << (31 - _BITS)

# Sampled vectors a layer, and a bound on their elements (8 MiB in float32).
_SAMPLES, _SAMPLE_ELEMENTS = 256, 1 << 21

# Tokens that are kept because they are the largest ones.
_EXTREMES = 8

# Sampled tokens or images from which input scales are chosen, within the same bound.
_EXAMPLES = 4096


class Reservoir:
    """A uniform random sample of all examples, in memory that does not grow with them (by random keys)."""

    def __init__(self, size: int, generator: torch.Generator):
        self.size, self.generator = size, generator
        self.samples: Any = None  # a tensor once data have come
        self._keys: Any = None

    def add(self, examples: Tensor) -> None:
        """Take some of these, (examples, ...), and leave as many others."""
        size = max(1, min(self.size, _SAMPLE_ELEMENTS // max(examples[0].numel(), 1)))
        keys = torch.rand(len(examples), dtype=torch.float32, generator=self.generator)
        if len(examples) > size:
            keys, best = keys.topk(size)
            examples = examples[best.to(examples.device)]
        if self.samples is not None:
            keys, examples = torch.cat([self._keys, keys]), torch.cat([self.samples, examples])
            keys, best = keys.topk(min(size, len(keys)))
            examples = examples[best.to(examples.device)]
        self._keys, self.samples = keys, examples.clone()


class Channels:
    """What the first pass over the batches keeps of one layer's input channels: from all of them follows what is
    subtracted and divided before the second, which measures what is left.

    Attributes:
        sums, squares: (input channels,) of w x and w x², with w of :func:`hf_reram.nn.observe.input_weights` for
            tokens and 1 for pixels, in double precision. total: Σ w.
    """

    def __init__(self, layer: CrossbarLayer, name: str, seed: int):
        self.layer, self.name = layer, name
        self.sums: Any = 0.0
        self.squares: Any = 0.0
        self.total = 0.0
        self._reservoir = Reservoir(_EXAMPLES, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def update(self, x: Tensor, keep: Tensor | None) -> None:
        """Take in one batch; ``keep`` is 0 at padding tokens."""
        x = _kept(x, keep)
        if x.numel() == 0:
            return
        channels = x.movedim(self.layer.channel_dim, -1).flatten(0, -2)
        weights = channels.new_ones(len(channels), 1) if self.layer.reads_windows else input_weights(channels)
        weighted = channels * weights
        self.sums = self.sums + weighted.sum(0, dtype=torch.float64)
        self.squares = self.squares + (weighted * channels).sum(0, dtype=torch.float64)
        self.total += float(weights.sum(dtype=torch.float64))
        if self.layer.crossbar.config.equalize_inputs:
            self._reservoir.add(self.layer.examples(x))

    def give(self, other: "LayerStatistics") -> None:
        """Set the offset and the scales of a layer that reads this input."""
        config = self.layer.crossbar.config
        if self.total and config.center_inputs:
            other.offset = input_offset(self.sums / self.total, self.squares / self.total)
        if self.total and config.equalize_inputs:
            other.scale = input_scale(center(self.layer, self._reservoir.samples, other.offset), self.layer)


class LayerStatistics:
    """What calibration keeps of one layer's inputs.

    Attributes:
        counts: (bins,) histogram of |x|, in double precision. largest: max |x|. smallest: min x, at most 0.
        lowest: min x in units of its token's (image's) largest magnitude, at most 0.
        samples: (at most 256, groups · rows) vectors that met the array.
        extremes: the few largest of all tokens, of the same form; none of pixels.
        offset, scale: (input channels,), subtracted from the input, zero where that does not help, and what it is
            divided by then, one where that does not help; those of :class:`Channels`.
    """

    def __init__(self, layer: CrossbarLayer, name: str, seed: int):
        self.layer, self.name = layer, name
        device = layer.weight.device
        self.offset = torch.zeros(layer.inputs, dtype=torch.float32, device=device)
        self.scale = torch.ones(layer.inputs, dtype=torch.float32, device=device)
        self.counts = torch.zeros(_BINS, dtype=torch.float64, device=device)
        self.largest = self.smallest = self.lowest = 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self._reservoir = Reservoir(_SAMPLES, self.generator)
        self.extremes = torch.zeros(0, layer.inputs + 1, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, keep: Tensor | None) -> None:
        """Take in one batch; ``keep`` is 0 at padding tokens."""
        x = _kept(x, keep)
        if x.numel() == 0:
            return
        x = equalize(self.layer, center(self.layer, x, self.offset), self.scale)
        magnitude = x.abs().reshape(-1)
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise NotFiniteError(f"calibration data drive layer {self.name!r} with NaN or infinite values")
        self.largest, self.smallest = max(self.largest, largest), min(self.smallest, float(x.min()))
        self.counts += torch.bincount(magnitude.view(torch.int32).bitwise_right_shift(_BITS), minlength=_BINS)
        examples = self.layer.examples(x)
        peaks = examples.flatten(1).abs().amax(1).clamp(min=TINY)
        self.lowest = min(self.lowest, float((examples.flatten(1).amin(1) / peaks).min()))
        if not self.layer.reads_windows:
            top = peaks.topk(min(_EXTREMES, len(peaks))).indices
            kept = torch.cat((self.extremes, torch.cat((examples[top], peaks[top, None]), 1)))
            self.extremes = kept[kept[:, -1].topk(min(_EXTREMES, len(kept))).indices]
        self._reservoir.add(self._vectors(examples, peaks[:, None]))

    @property
    def samples(self) -> Any:
        """A tensor once data have come, else None."""
        found = self._reservoir.samples
        return found if found is None else found[:, :-1]

    @property
    def peaks(self) -> Tensor:
        """The largest magnitude of the token or image that each sample is of, (samples, 1)."""
        return self._reservoir.samples[:, -1:]

    def _vectors(self, examples: Tensor, peaks: Tensor) -> Tensor:
        if not self.layer.reads_windows:
            return torch.cat((examples, peaks), 1)
        pick = torch.randperm(len(examples), generator=self.generator)[:4].tolist()
        windows = [self.layer.windows(examples[i : i + 1]) for i in pick]
        return torch.cat([torch.cat((w, peaks[i].expand(len(w), 1)), 1) for i, w in zip(pick, windows)])

    # What follows from them

    def centers(self) -> Tensor:
        """The |x| that stands for each bin, (bins,)."""
        bits = torch.arange(_BINS, dtype=torch.int32, device=self.counts.device) << _BITS
        middle = (bits + (1 << (_BITS - 1))).view(torch.float32).double()
        return middle.nan_to_num(nan=0.0).clamp(max=max(self.largest, 1e-30))

    def percentile(self, percent: float) -> float:
        """The given percentile of |x|, interpolated within its bin."""
        total = float(self.counts.sum())
        if percent >= 100 or total == 0 or self.largest == 0:
            return self.largest
        below = self.counts.cumsum(0)
        target = total * percent / 100
        index = min(int(torch.searchsorted(below, target)), _BINS - 1)
        start = float(below[index - 1]) if index else 0.0
        inside = (target - start) / max(float(self.counts[index]), 1e-30)
        edges = torch.tensor((index << _BITS, (index + 1) << _BITS), dtype=torch.int32).view(torch.float32).tolist()
        return min(edges[0] + inside * (edges[1] - edges[0]), self.largest)

    def grouped_samples(self) -> Tensor:
        """(groups, samples, crossbar rows)."""
        return self.grouped(self.samples)

    def grouped(self, vectors: Tensor) -> Tensor:
        """Vectors that meet the array, group by group."""
        return vectors.view(len(vectors), self.layer.groups, -1).transpose(0, 1)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """The input in float32, without padding."""
    x = x.detach().float()
    return x if keep is None else x.reshape(-1, x.shape[-1])[keep.bool()]
