"""One layer of each kind that goes on crossbars, with an input for it."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

CONVS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 5), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 2, "groups": 4},  # as many rows a group as input channels
    {"kernel_size": 3, "groups": 8, "padding": 1, "bias": False},
    *({"kernel_size": 3, "padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"kernel_size": 1, "stride": 3},
]
SEQUENCES = [  # of nn.Conv1d, by their padding or the like; the kernel size is a tuple of one there
    {"kernel_size": (3,)},
    {"kernel_size": (3,), "stride": 2, "padding": 1, "groups": 4},
    {"kernel_size": (4,), "padding": 6, "dilation": 2, "padding_mode": "circular", "bias": False},
    {"kernel_size": (3,), "padding": "same", "groups": 8},
]
KINDS = ["linear", "conv1d", *CONVS, *SEQUENCES]


def layer_of(kind) -> tuple[nn.Module, torch.Tensor]:
    """A layer of a kind of ``KINDS`` and an input."""
    if kind == "linear":
        return nn.Linear(8, 6), torch.randn(5, 7, 8)
    if kind == "conv1d":
        return Conv1D(6, 8), torch.randn(5, 7, 8)
    if kind in SEQUENCES:
        return nn.Conv1d(8, 16, **kind), torch.randn(3, 8, 29)
    return nn.Conv2d(8, 16, **kind), torch.randn(3, 8, 11, 13)
