"""Convolutions on crossbars: an output pixel is one read of the array, whose rows are the kernel's inputs."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import CrossbarMixin
from .ops.power import Pull, input_power


class CrossbarConv2d(CrossbarMixin, nn.Conv2d):
    """``nn.Conv2d`` on a crossbar, x (N, C, H, W) or (C, H, W): all strides, paddings and padding modes, dilation,
    groups. Each group is an array of ``in_channels / groups · kernel height · kernel width`` rows; a tile holds whole
    input channels."""

    def pad(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        pads = self._reversed_padding_repeated_twice
        return F.pad(x, pads, mode=mode) if any(pads) else x

    def _padded(self, s: Tensor) -> Tensor:
        """The driven input with padding, which it already has where the layer centers it."""
        return s if self.centered else self.pad(s)

    def _shape_key(self) -> tuple:
        return (type(self), self.kernel_size, self.stride, self.dilation, self.padding, self.padding_mode)

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.shape == self.weight.shape and not self.centered:
            return self._conv_forward(s, weight, bias)
        return F.conv2d(self._padded(s), weight, bias, self.stride, 0, self.dilation, self.groups)

    def _area(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    def _width(self) -> int:
        return self.in_channels // self.groups * self._area()

    def tile_rows(self) -> int:
        return max(super().tile_rows() // self._area(), 1) * self._area()

    def _tiles(self, s: Tensor, weight: Tensor):
        channels, size = weight.shape[1], self.tile_rows() // self._area()
        if size >= channels:
            return [(s, weight)]
        grouped = s.unflatten(-3, (self.groups, channels))
        slices = [slice(start, start + size) for start in range(0, channels, size)]
        return [(grouped[..., part, :, :].flatten(-4, -3), weight[:, part]) for part in slices]

    def _input_power(self, s: Tensor, pull: Pull | None) -> Tensor:
        # Summed over the batch first: a window's sum of squares needs no unfolding of the whole batch.
        power = input_power(s if s.dim() == 4 else s[None], None, pull)
        return self.unfold(self._padded(power[None])).sum(-1).view(self.groups, -1)

    def unfold(self, x: Tensor) -> Tensor:
        """The array's input for each output pixel, (N, C · kernel area, pixels), of a padded one."""
        return F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, self.out_channels // self.groups, -1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.view(self.weight.shape)

    def _output_rows(self, y: Tensor) -> Tensor:
        return y if y.dim() == 4 else y[None]

    def _broadcast(self, per_channel: Tensor, like: str) -> Tensor:
        return per_channel[:, None, None, None] if like == "weight" else per_channel[:, None, None]

    def _along_inputs(self, per_channel: Tensor) -> Tensor:
        own = per_channel.view(self.groups, 1, -1).expand(-1, self.out_channels // self.groups, -1)
        return own.reshape(self.out_channels, -1, 1, 1)


class CrossbarConv2dSame(CrossbarConv2d):
    """timm's ``Conv2dSame``: TensorFlow's padding, which depends on the input's size."""

    def pad(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(x.shape[:-3:-1], *self._reversed_geometry()):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads) if any(pads) else x

    def _reversed_geometry(self):
        return self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1]

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(self._padded(s), weight, bias, self.stride, 0, self.dilation, self.groups)
