"""A fingerprint of a model's weights, so that numbers are never shown for other weights than they were measured on."""

import hashlib
import json

import torch
from torch import nn

from .find import crossbar_state


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """The same of a patched model's weights and its ReRAMConfig together: two models that age alike have the same."""
    config = json.dumps(crossbar_state(model).config.to_dict(), sort_keys=True)
    return hashlib.sha256(f"{weights_digest(model)} {config}".encode()).hexdigest()
