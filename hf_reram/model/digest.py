"""A fingerprint of a model's weights, and what its forward depends on beside them, so that numbers are never shown for
another model than they were measured on."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..nn import CrossbarLayer
from ..nn.scalars import BUFFERS
from ..nn.tensors import whole
from .adapters import adapter_keys, adapter_scales, adapters_in_use
from .attributes import NO_CODE, UNTOLD, VALUES, are_close, attributes_of, configs_of
from .find import WRAPPERS, crossbar_states, unwrapped
from .settings import telling
from .sharding import reshard


def weights_digest(model: nn.Module, base: bool = False) -> str:
    """SHA-256 over names, dtypes, shapes and values of the state dict, and over which of several adapters are in use,
    in hexadecimal; whatever replicates, shards or compiles the model. Where the weights are sharded (FSDP2), all
    processes have to ask for it.

    Args:
        base: leave out crossbars' numbers of calibration and PEFT's adapters, so that it is the same however the same
            weights are mapped.

    Raises:
        ValueError: weights are on the meta device, as where accelerate has offloaded them.
    """
    digest = hashlib.sha256()
    inner: Any = model
    while isinstance(inner, WRAPPERS) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, WRAPPERS) else inner._orig_mod
    reshard(inner)
    left_out = _beside_the_base(inner) if base else set()
    for name, tensor in sorted(inner.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or name in left_out:
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


def _beside_the_base(model: nn.Module) -> set[str]:
    """Keys of the state dict that are numbers of calibration or of PEFT's adapters."""
    layers = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, CrossbarLayer)]
    found = {f"{name}.{buffer}" if name else buffer for name in layers for buffer in BUFFERS}
    return found | adapter_keys(model)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What an evaluation of the model depends on beside its weights and its ReRAMConfig, as plain JSON values by name:
    the config of the Hugging Face model, or of those inside, without what changes no figure, adapters' scales, and
    fingerprints of what else its modules hold (:func:`.attributes.attributes_of`), as ``attributes``. In reports of
    older versions these are other ones, as ``modules``."""
    found: dict[str, Any] = {}
    for name, config in configs_of(model).items():
        found |= {f"{name}.{key}" if name else key: value for key, value in telling(config).items()}
    if scales := adapter_scales(unwrapped(model)):
        found["adapters"] = scales
    found["attributes"] = attributes_of(model)
    text = json.dumps(found, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value))
    return json.loads(text, parse_constant=str)


def other_settings(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what two models' settings say differently; what only one of them has, as of another version of
    transformers, is not compared, and sums of floating-point numbers up to their last bits."""
    found = []
    for name in mine.keys() & theirs.keys():
        one, other = mine[name], theirs[name]
        if name.endswith(VALUES):
            found += [] if are_close(one, other) else [name]
        elif isinstance(one, dict) and isinstance(other, dict):
            found += [f"{name}.{part}" for part in other_settings(one, other)]
        elif one != other:
            found.append(name)
    return sorted(found, key=lambda name: (name.startswith("attributes."), name))  # which follow from the others


def values_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a model's settings the sums of floating-point numbers, which :func:`other_settings` compares."""
    return {name: part for name, part in settings["attributes"].items() if name.endswith(VALUES)}


def untold_in(settings: dict[str, Any]) -> list[str]:
    """Names of the modules' attributes, and of variables of code, that nothing tells from others."""
    return [name.removesuffix(UNTOLD) for name in settings["attributes"] if name.endswith(UNTOLD)]


def model_digest(model: nn.Module, weights: str | None = None, settings: dict[str, Any] | None = None) -> str:
    """The same of a patched model's weights, its ReRAMConfig and its settings together: two models that do and age
    alike have the same. Without :func:`values_of` it, which agree only up to their last bits.

    Args:
        weights: their digest where it is known. settings: of :func:`settings_of` the model, where they are known.
    """
    configs = [state.config.to_dict() for state in crossbar_states(model)]
    settings = {**(settings or settings_of(model))}
    parts = settings["attributes"].items()
    settings["attributes"] = {name: part for name, part in parts if not name.endswith(VALUES) and part != NO_CODE}
    config = json.dumps([configs, settings], sort_keys=True)
    return hashlib.sha256(f"{weights or weights_digest(model)} {config}".encode()).hexdigest()
