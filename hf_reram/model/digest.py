"""A fingerprint of a model's weights, so that numbers are never shown for other weights than they were measured on."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from .find import WRAPPERS, crossbar_states


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the state dict, in hexadecimal; whatever replicates or compiles
    the model.

    Raises:
        ValueError: weights are on the meta device, as where accelerate has offloaded them.
    """
    digest = hashlib.sha256()
    whole: Any = model
    while isinstance(whole, WRAPPERS) or hasattr(whole, "_orig_mod"):
        whole = whole.module if isinstance(whole, WRAPPERS) else whole._orig_mod
    for name, tensor in sorted(whole.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, as where accelerate has offloaded it: allowed is a model that is "
                "loaded whole"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """The same of a patched model's weights and its ReRAMConfig together: two models that age alike have the same."""
    configs = [state.config.to_dict() for state in crossbar_states(model)]
    config = json.dumps(configs[0] if len(configs) == 1 else configs, sort_keys=True)
    return hashlib.sha256(f"{weights_digest(model)} {config}".encode()).hexdigest()
