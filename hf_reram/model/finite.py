"""Weights that are no numbers, of which no figure is a model's."""

import itertools

import torch
from torch import Tensor, nn

from ..device.checks import some
from ..nn.tensors import own_part
from .sharding import is_sharded, of_each, processes, reshard

CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_not_finite(model: nn.Module) -> None:
    """Look at all weights where they are, without a copy. Of weights that are sharded (FSDP2) all processes have to
    ask, and are told the same.

    Raises:
        ValueError: parameters hold NaN or infinite values, or buffers NaN (a mask may be infinite); names them.
    """
    reshard(model)
    found = [name for name, tensor in model.named_parameters() if not _holds(tensor, infinite=False)]
    found += [name for name, tensor in model.named_buffers() if not _holds(tensor, infinite=True)]
    if processes() > 1 and is_sharded(model):
        found = list(dict.fromkeys(itertools.chain.from_iterable(of_each(found))))
    if found:
        raise ValueError(f"NaN or infinite values are in {some(found)}: allowed are finite numbers")


def _holds(tensor: Tensor, infinite: bool) -> bool:
    """Whether this process's part of a tensor holds numbers alone, or ``infinite`` ones too."""
    values = own_part(tensor.detach())
    if values.is_meta or values.dtype not in CHECKED or not values.numel():
        return True
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.is_sparse else values.values()  # dense it may not fit
        if not values.numel():
            return True
    ends = torch.stack(torch.aminmax(values))  # both are NaN where any value is
    return not bool(ends.isnan().any()) if infinite else bool(ends.isfinite().all())
