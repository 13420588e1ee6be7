"""Models whose weights several processes hold a part each of, as under FSDP2, and what these decide alike."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.places import place
from ..nn.tensors import is_shard, whole


def processes() -> int:
    """How many processes ``torch.distributed`` joins, 1 where it joins none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the model's weights: whatever needs them whole, a forward too, is then
    to be called by all processes."""
    return bool(_fsdp_modules(model)) or any(is_shard(p) for p in model.parameters())


def talks(model: nn.Module) -> bool:
    """Whether a forward takes part of all processes: weights are sharded, or DDP sends the first one's buffers."""
    return processes() > 1 and (isinstance(model, DistributedDataParallel) or is_sharded(model))


def reshard(model: nn.Module) -> None:
    """Have every process hold its part of the weights alone again; FSDP2 leaves the root's whole after a forward, as
    tensors that are others after the next."""
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:  # whose import takes a while
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Layers with their whole weight and bias, to be read, in place of this process's parts; by all processes."""
    places = dict.fromkeys(place(layer, name) for layer in layers for name in ("weight", "bias"))
    named = ((module, name, module._parameters.get(name)) for module, name in places)
    parts: list[Any] = [(module, name, part) for module, name, part in named if is_shard(part)]
    try:
        for layer, name, part in parts:
            layer._parameters[name] = nn.Parameter(whole(part.detach()), part.requires_grad)
        yield
    finally:
        for layer, name, part in parts:
            layer._parameters[name] = part


def any_process(mine: list[bool], device: torch.device) -> list[bool]:
    """Of each the truth in any process; to be called by all with as many."""
    flags = torch.tensor(mine, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def is_first() -> bool:
    """Whether this process is the first one, or alone."""
    return processes() == 1 or dist.get_rank() == 0


def of_first(value: Any) -> Any:
    """The value of the first process, in all of them; to be called by all."""
    if processes() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def of_each(value: Any) -> list[Any]:
    """The values of all processes, in all of them."""
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def alike(several: bool, what: str = "the evaluation") -> Iterator[None]:
    """What fails in one of ``several`` processes inside fails in all, before they would wait for it elsewhere.

    Args:
        what: it is that fails, for the error in the others.

    Raises:
        RuntimeError: it failed in another process; names it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    if several:
        told = of_each(None if error is None else f"{type(error).__name__}: {error}")
        if error is None and (failed := [rank for rank, text in enumerate(told) if text is not None]):
            error = RuntimeError(f"{what} failed in process {failed[0]}: {told[failed[0]]}")
    if error is not None:
        raise error
