"""A fingerprint of a model's weights, so that numbers are never shown for other weights than they were measured on."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..nn.tensors import whole
from .adapters import adapters_in_use
from .find import WRAPPERS, crossbar_states
from .sharding import reshard


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the state dict, and over which of several adapters are in use,
    in hexadecimal; whatever replicates, shards or compiles the model. Where the weights are sharded (FSDP2), all
    processes have to ask for it.

    Raises:
        ValueError: weights are on the meta device, as where accelerate has offloaded them.
    """
    digest = hashlib.sha256()
    inner: Any = model
    while isinstance(inner, WRAPPERS) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, WRAPPERS) else inner._orig_mod
    reshard(inner)
    for name, tensor in sorted(inner.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, as where accelerate has offloaded it: allowed is a model that is "
                "loaded whole"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for line in adapters_in_use(inner):
        digest.update(line.encode())
    return digest.hexdigest()


def model_digest(model: nn.Module, weights: str | None = None) -> str:
    """The same of a patched model's weights and its ReRAMConfig together: two models that age alike have the same.

    Args:
        weights: their digest where it is known.
    """
    configs = [state.config.to_dict() for state in crossbar_states(model)]
    config = json.dumps(configs[0] if len(configs) == 1 else configs, sort_keys=True)
    return hashlib.sha256(f"{weights or weights_digest(model)} {config}".encode()).hexdigest()
