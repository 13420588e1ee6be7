"""Convolutions on crossbars: an output pixel is one read of the array, whose rows are the kernel's inputs."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import CrossbarLayer
from .registry import register_crossbar


class _Convolution(CrossbarLayer):
    """All strides, paddings and padding modes, dilation, groups. Each group is an array of ``in_channels / groups ·
    kernel elements`` rows; a tile holds whole input channels."""

    output_dim, input_dim = 0, 1

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    padding_mode: Any
    convolve: ClassVar[Callable[..., Tensor]]  # PyTorch's function

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        convolve = type(self).convolve
        if not padded and self.padding_mode == "zeros":  # of which the kernel takes care itself
            return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return convolve(x if padded else self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        pads: Any = self._reversed_padding_repeated_twice
        return F.pad(x, pads, mode=mode) if any(pads) else x

    def geometry(self) -> tuple:
        return type(self), self.kernel_size, self.stride, self.dilation, self.padding, self.padding_mode


@register_crossbar(nn.Conv2d)
class CrossbarConv2d(_Convolution, nn.Conv2d):
    """``nn.Conv2d`` on a crossbar, x (N, C, H, W) or (C, H, W)."""

    channel_dim, convolve = -3, F.conv2d

    def windows(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)  # (N, C · kernel area, pixels)
        return columns.transpose(1, 2).flatten(0, 1)


@register_crossbar(nn.Conv1d)
class CrossbarConv1d(_Convolution, nn.Conv1d):
    """``nn.Conv1d`` on a crossbar, as of speech models, x (N, C, L) or (C, L). GPT-2's ``Conv1D`` is another thing."""

    channel_dim, convolve = -2, F.conv1d

    def windows(self, x: Tensor) -> Tensor:
        reach = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        windows = x.unfold(-1, reach, self.stride[0])[..., :: self.dilation[0]]  # (N, C, positions, kernel)
        return windows.transpose(1, 2).flatten(0, 1).flatten(1)


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
