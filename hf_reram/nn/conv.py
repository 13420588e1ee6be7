"""Convolutions on crossbars: an output pixel is one read of the array, whose rows are the kernel's inputs."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import CrossbarLayer
from .registry import register_crossbar


@register_crossbar(nn.Conv2d)
class CrossbarConv2d(CrossbarLayer, nn.Conv2d):
    """``nn.Conv2d`` on a crossbar, x (N, C, H, W) or (C, H, W): all strides, paddings and padding modes, dilation,
    groups. Each group is an array of ``in_channels / groups · kernel height · kernel width`` rows; a tile holds whole
    input channels."""

    output_dim, input_dim, channel_dim = 0, 1, -3

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        if not padded and self.padding_mode == "zeros":  # of which the kernel takes care itself
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x if padded else self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        pads = self._reversed_padding_repeated_twice
        return F.pad(x, pads, mode=mode) if any(pads) else x

    def windows(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)  # (N, C · kernel area, pixels)
        return columns.transpose(1, 2).flatten(0, 1)

    def geometry(self) -> tuple:
        return type(self), self.kernel_size, self.stride, self.dilation, self.padding, self.padding_mode


@register_crossbar("timm.Conv2dSame")
class CrossbarConv2dSame(CrossbarConv2d):
    """timm's ``Conv2dSame``: TensorFlow's padding, which depends on the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        return CrossbarLayer.forward(self, x)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        return F.conv2d(x if padded else self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        geometry = zip(*(reversed(part) for part in (self.kernel_size, self.stride, self.dilation)))
        for size, (kernel, stride, dilation) in zip(x.shape[:-3:-1], geometry):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads) if any(pads) else x
