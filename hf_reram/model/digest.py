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
from .attributes import NO_CODE, TRAINING_ONLY, VALUES, are_close, attributes_of
from .find import WRAPPERS, crossbar_states, unwrapped, walk
from .sharding import reshard

# Of a model's config: where it is from, how it is stored and called, and what a robust model's config says elsewhere.
COSMETIC = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
)


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
    fingerprints of what else its modules hold (:func:`.attributes.attributes_of`), as ``modules``."""
    found: dict[str, Any] = {}
    inside: set[nn.Module] = set()
    for name, module in walk(model):
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        if callable(to_dict) and module not in inside:
            inside |= set(module.modules())
            found |= {f"{name}.{key}" if name else key: value for key, value in _telling(to_dict()).items()}
    if scales := adapter_scales(unwrapped(model)):
        found["adapters"] = scales
    found["modules"] = attributes_of(model)
    text = json.dumps(found, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value))
    return json.loads(text, parse_constant=str)


def _telling(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what changes no figure, those inside it too."""
    classes = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else None
    found = {}
    for key, value in config.items():
        if key in COSMETIC or TRAINING_ONLY.fullmatch(str(key)):
            continue
        # Heads write there what they find the labels to be; the same labels tell it again.
        if key == "problem_type" and (value is None or (value == "regression") == (classes == 1)):
            continue
        found[key] = _telling(value) if isinstance(value, dict) else value
    return found


def other_settings(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what two models' settings say differently; what only one of them has, as of another version of
    transformers, is not compared, and sums of floating-point numbers up to their last bits."""
    found = []
    for name in mine.keys() & theirs.keys():
        one, other = mine[name], theirs[name]
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{name}.{part}" for part in other_settings(one, other)]
        elif one != other and not (name.endswith(VALUES) and are_close(one, other)):
            found.append(name)
    return sorted(found, key=lambda name: (name.startswith("modules."), name))  # which follow from the others


def values_of(model: nn.Module) -> dict[str, Any]:
    """Of a model's settings the sums of floating-point numbers, which :func:`other_settings` compares."""
    return {name: part for name, part in attributes_of(model).items() if name.endswith(VALUES)}


def model_digest(model: nn.Module, weights: str | None = None) -> str:
    """The same of a patched model's weights, its ReRAMConfig and its settings together: two models that do and age
    alike have the same. Without :func:`values_of` it, which agree only up to their last bits.

    Args:
        weights: their digest where it is known.
    """
    configs = [state.config.to_dict() for state in crossbar_states(model)]
    settings = settings_of(model)
    modules = settings["modules"].items()
    settings["modules"] = {name: part for name, part in modules if not name.endswith(VALUES) and part != NO_CODE}
    config = json.dumps([configs, settings], sort_keys=True)
    return hashlib.sha256(f"{weights or weights_digest(model)} {config}".encode()).hexdigest()
