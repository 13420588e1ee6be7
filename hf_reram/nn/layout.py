"""How a layer's weight lies on the array: what a kind of layer says of it, and what follows from that."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import CrossbarState


class Layout(nn.Module):
    """What a kind of layer says:

    - :attr:`output_dim`, :attr:`input_dim`: the weight's dimensions of output channels and of (a group's) input
      channels; all others are the kernel's. :attr:`channel_dim`: of channels in inputs and outputs, counted from the
      end. ``weight`` and ``bias``, which may be None, and ``groups``, 1 unless the layer has some.
    - :meth:`multiply`: the layer's product, in which each output reads every row of its group once, of an input that is
      padded (so that a transposed convolution is none).
    - :meth:`pad`, :meth:`windows` and :meth:`geometry`, where an array reads windows of the input instead of its
      channels.
    - ``forward``, calling :meth:`.layer.CrossbarLayer.forward`, where the digital layer's argument is not ``input``.
    """

    output_dim: ClassVar[int]
    input_dim: ClassVar[int]
    channel_dim: ClassVar[int]
    groups: Any = 1

    weight: Any
    weight_scale: Tensor
    row_copies: Tensor
    copied: Any  # whether they are others than 1
    crossbar: CrossbarState

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        """The layer's product, as of the digital layer.

        Args:
            x: input, or some of its channels, the same of each group. weight: for these, else of the layer's shape.
            bias: (output channels,) or None. padded: x went through :meth:`pad` before.
        """
        raise NotImplementedError

    def pad(self, x: Tensor) -> Tensor:
        """The input with what the layer pads it with."""
        return x

    def windows(self, x: Tensor) -> Tensor:
        """All vectors that meet the array, (vectors, groups · crossbar rows), of a padded input."""
        return x.reshape(-1, x.shape[-1])

    def geometry(self) -> tuple:
        """What a padded input depends on beside the input."""
        return ()

    @classmethod
    def missing_of_contract(cls) -> list[str]:
        """What a kind of layer does not say."""
        missing = [name for name in ("output_dim", "input_dim", "channel_dim") if not hasattr(cls, name)]
        needed = ["multiply"] if getattr(cls, "channel_dim", -1) == -1 else ["multiply", "windows"]
        return missing + [name for name in needed if getattr(cls, name) is getattr(Layout, name)]

    # What follows from that

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.weight.shape[self.output_dim]

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.weight.shape[self.input_dim] * self.groups

    @property
    def reads_windows(self) -> bool:
        """Whether a vector that meets the array is a window of the input, as in a convolution."""
        return self.channel_dim < -1

    @property
    def width(self) -> int:
        """Crossbar rows of an output channel."""
        return self.weight.numel() // max(self.outputs, 1)

    @property
    def area(self) -> int:
        """Crossbar rows of an input channel: the kernel's elements."""
        return self.width // max(self.weight.shape[self.input_dim], 1)

    def to_rows(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as (groups, output channels of a group, crossbar rows)."""
        rows = weight.movedim(self.output_dim, 0)
        return rows.reshape(self.groups, len(rows) // self.groups, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_rows`; groups and their output channels may be one dimension."""
        shape = self.weight.movedim(self.output_dim, 0).shape
        return rows.reshape(shape).movedim(0, self.output_dim)

    def along_outputs(self, per_channel: Tensor) -> Tensor:
        """A vector over output channels shaped to broadcast against the weight."""
        return _along(per_channel, self.output_dim, self.weight.dim())

    def along_inputs(self, per_channel: Tensor) -> Tensor:
        """A vector over input channels shaped to broadcast against the weight."""
        if self.groups == 1:
            return _along(per_channel, self.input_dim, self.weight.dim())
        own = per_channel.view(self.groups, 1, -1, 1).expand(-1, self.outputs // self.groups, -1, self.area)
        return self.from_rows(own)

    def over_channels(self, per_channel: Tensor) -> Tensor:
        """A vector over input or output channels shaped to broadcast against an input or an output."""
        return per_channel.view(-1, *[1] * (-1 - self.channel_dim))

    def examples(self, x: Tensor) -> Tensor:
        """An input or output as (tokens, channels), or (images, channels, height, width), or the like."""
        return x if x.dim() == 1 - self.channel_dim else x.reshape(-1, *x.shape[self.channel_dim :])

    def tile_rows(self) -> int:
        """Crossbar rows of a tile, which holds whole input channels where it can hold one."""
        rows = max(1, min(self.crossbar.config.tile_size or self.width, self.width))
        return rows // self.area * self.area or rows

    def tiles(self) -> int:
        """Tiles that an output channel's rows are spread over."""
        return -(-self.width // self.tile_rows())

    def split(self, x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of input and weight, a tile each, whose products add up."""
        channels, size = weight.shape[self.input_dim], self.tile_rows() // self.area
        if not size:  # of an input channel each holds some of the kernel's elements
            rows, tile = self.to_rows(weight), self.tile_rows()
            starts = range(0, self.width, tile)
            held = [F.pad(rows[..., s : s + tile], (s, max(self.width - s - tile, 0))) for s in starts]
            return [(x, self.from_rows(part)) for part in held]
        if size >= channels:  # splitting costs a copy in the backward
            return [(x, weight)]
        grouped = x.unflatten(self.channel_dim, (self.groups, channels)) if self.groups > 1 else x
        parts = list(zip(grouped.split(size, self.channel_dim), weight.split(size, self.input_dim)))
        if self.groups > 1:
            parts = [(part.flatten(self.channel_dim - 1, self.channel_dim), w) for part, w in parts]
        return parts

    def along_rows(self, scale: Tensor) -> Tensor:
        """A tensor of weight_scale's shape so that it broadcasts against (groups, channels, crossbar rows)."""
        if scale.dim() == 2:
            scale = scale.repeat_interleave(self.tile_rows(), 1)[:, : self.width]
        groups = self.groups if len(scale) > 1 else 1
        return scale.view(groups, len(scale) // groups, -1)

    def held_scale(self, dtype: torch.dtype | None = None, scale: Tensor | None = None) -> Tensor:
        """What the cells of a weight hold together at most: weight_scale, or another ``scale`` of its shape, times the
        copies of the weight's row, so that it broadcasts against the weight, in a dtype, None for the weight's."""
        one, copies = self.row_scale(dtype, scale)
        return one if copies is None else one * copies

    def row_scale(self, dtype: torch.dtype | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The factors of :meth:`held_scale`, whose product is of the weight's size where rows have copies: what a
        single cell pair holds at most, and the copies, None where there are none."""
        scale = (self.weight_scale if scale is None else scale).to(self.weight.dtype if dtype is None else dtype)
        one = self.along_outputs(scale) if scale.dim() == 1 else self.from_rows(self.along_rows(scale))
        return one, self.along_inputs(self.row_copies).to(one.dtype) if self.copied else None

    def averaged(self, power: Tensor) -> Tensor:
        """Of the power of a cell's error, of the weight's shape and in units of :meth:`held_scale`, what is left of it
        where a weight's row has copies, whose cells err independently."""
        return power / self.along_inputs(self.row_copies).to(power.dtype) if self.copied else power

    def copies_of_rows(self) -> Tensor:
        """row_copies of each crossbar row, (groups, 1, crossbar rows)."""
        return self.row_copies.view(self.groups, 1, -1).repeat_interleave(self.area, 2)


def _along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """A vector along one of a tensor's dimensions."""
    return vector.view([-1 if d == dim else 1 for d in range(dims)])
