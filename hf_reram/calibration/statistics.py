"""What calibration keeps of each layer's inputs."""

import math
from typing import Any

import torch
from torch import Tensor

from ..nn import CrossbarLayer
from ..nn.drive import center, equalize
from .input_scales import input_offset, input_scale

# Histogram of |x|: 64 bins an octave from 2^-40 to 2^40 resolve a range to 1 %.
_BINS_PER_OCTAVE, _OCTAVES = 64, 80
_BINS = _BINS_PER_OCTAVE * _OCTAVES

# Sampled vectors a layer, and a bound on their elements (8 MiB in float32).
_SAMPLES, _SAMPLE_ELEMENTS = 256, 1 << 21


class LayerStatistics:
    """What calibration keeps of one layer's inputs.

    Attributes:
        counts: (bins,) histogram of |x|, in double precision. largest: max |x|. smallest: min x, at most 0.
        samples: (at most 256, groups · rows) vectors that met the array.
        offset, scale: (input channels,), subtracted from the input, zero where that does not help, and what it is
            divided by then, one where that does not help; from the first batch.
    """

    def __init__(self, layer: CrossbarLayer, name: str, seed: int):
        self.layer, self.name = layer, name
        self.offset: Any = None
        self.scale: Any = None
        device = layer.weight.device
        self.counts = torch.zeros(_BINS, dtype=torch.float64, device=device)
        self.largest = self.smallest = 0.0
        self.samples: Any = None  # a tensor once data have come
        self.keys: Any = None
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, x: Tensor, keep: Tensor | None) -> None:
        """Take in one batch; ``keep`` is 0 at padding tokens."""
        x = x.detach().float()
        if keep is not None:
            x = x.reshape(-1, x.shape[-1])[keep.bool()]
        if x.numel() == 0:
            return
        if self.offset is None:
            config = self.layer.crossbar.config
            self.offset = (
                input_offset(x, self.layer) if config.center_inputs else torch.zeros_like(input_offset(x, self.layer))
            )
            centered = center(self.layer, x, self.offset)
            self.scale = input_scale(centered, self.layer) if config.equalize_inputs else torch.ones_like(self.offset)
        x = equalize(self.layer, center(self.layer, x, self.offset), self.scale)
        magnitude = x.abs().reshape(-1)
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise ValueError(f"calibration data drive layer {self.name!r} with NaN or infinite values")
        self.largest, self.smallest = max(self.largest, largest), min(self.smallest, float(x.min()))
        index = (magnitude.clamp(min=1e-30).log2() + _OCTAVES // 2).mul_(_BINS_PER_OCTAVE).long().clamp_(0, _BINS - 1)
        self.counts += torch.bincount(index, minlength=_BINS)
        self._sample(self.vectors(x))

    def follow(self, leader: "LayerStatistics") -> None:
        """Take over the offset and the scales of a layer that reads the same input."""
        self.offset, self.scale = leader.offset, leader.scale

    def vectors(self, x: Tensor) -> Tensor:
        examples = self.layer.examples(x)
        if not self.layer.reads_windows:
            return examples
        pick = torch.randperm(len(examples), generator=self.generator)[:4]
        return torch.cat([self.layer.windows(examples[i : i + 1]) for i in pick.tolist()])

    def _sample(self, vectors: Tensor) -> None:
        size = max(1, min(_SAMPLES, _SAMPLE_ELEMENTS // vectors.shape[1]))
        keys = torch.rand(len(vectors), generator=self.generator)
        if len(vectors) > size:
            keys, best = keys.topk(size)
            vectors = vectors[best.to(vectors.device)]
        if self.samples is not None:
            keys, vectors = torch.cat([self.keys, keys]), torch.cat([self.samples, vectors])
            keys, best = keys.topk(min(size, len(keys)))
            vectors = vectors[best.to(vectors.device)]
        self.keys, self.samples = keys, vectors.clone()

    # What follows from them

    def centers(self) -> Tensor:
        """The |x| that stands for each bin, (bins,)."""
        octave = (torch.arange(_BINS, dtype=torch.float64, device=self.counts.device) + 0.5) / _BINS_PER_OCTAVE
        return torch.exp2(octave - _OCTAVES // 2).clamp(max=max(self.largest, 1e-30))

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
        return min(2.0 ** ((index + inside) / _BINS_PER_OCTAVE - _OCTAVES // 2), self.largest)

    def grouped_samples(self) -> Tensor:
        """(groups, samples, crossbar rows)."""
        return self.grouped(self.samples)

    def grouped(self, vectors: Tensor) -> Tensor:
        """Vectors that meet the array, group by group."""
        return vectors.view(len(vectors), self.layer.groups, -1).transpose(0, 1)
