"""Put a model's layers on crossbars in place, and take them off again."""

import math
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.iv import full_scale_gain, uniform_gain
from ..nn import CrossbarMixin
from ..nn.layer import FILLS
from ..nn.mapping import layer_scales
from ..nn.state import CrossbarState
from .adapters import without_adapters
from .find import crossbar_layers, crossbar_state
from .hooks import ON_PATCH, ON_UNPATCH
from .select import channels, crossbar_class, select_layers
from .summary import summarize

logger = logging.get_logger(__name__)

MAX_TILES = 1024  # of a layer


def patch_model(model: nn.Module, config: ReRAMConfig) -> nn.Module:
    """Put every layer that ``config`` selects on a crossbar, in place, and return the model.

    ``nn.Linear`` becomes :class:`CrossbarLinear`, ``nn.Conv2d`` :class:`CrossbarConv2d`, GPT-2's ``Conv1D``
    :class:`CrossbarConv1D`, by class swap: no weight is copied and every state-dict key stays. Embeddings and layers
    tied to them stay digital, and so do PEFT's adapters beside a crossbar. Input ranges are set by
    :func:`hf_reram.calibrate`; until then each batch spans its own.

    Raises:
        ValueError: the model is patched already, nothing is left to patch, a name in ``target_modules`` or
            ``modules_to_not_convert`` matches nothing, or a weight is NaN or infinite.
        TypeError: ``config`` is no ReRAMConfig.
    """
    if not isinstance(config, ReRAMConfig):
        raise TypeError(f"config={config!r}: allowed is a ReRAMConfig")
    base = without_adapters(model)
    swap_layers(base, config)
    initialize_layers(base)
    for attach in ON_PATCH:
        attach(base, config)
    logger.info("%s", summarize(base))
    return model


def swap_layers(model: Any, config: ReRAMConfig) -> CrossbarState:
    """Swap the classes of the selected layers and register their buffers, also on the meta device."""
    if crossbar_layers(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch_model(model) first")
    selected: dict[str, Any] = select_layers(model, config)
    for name, module in selected.items():
        if module.weight.device.type != "meta" and not torch.isfinite(module.weight.detach()).all():
            raise ValueError(f"the weight of layer {name!r} holds NaN or infinite values")
        _check_tiles(name, module, config)
    state = CrossbarState(config)
    for name, module in selected.items():
        digital = type(module)
        module.__class__ = crossbar_class(module)
        module._digital_class = digital
        module.init_crossbar(state, name, *channels(module))
    for module in model.modules():
        if getattr(module, "inplace", False) is True:  # would overwrite the output that a retention term still needs
            module.inplace, module._was_inplace = False, True
    model._crossbar_hook = model.register_forward_pre_hook(_BeginForward(state), with_kwargs=True)
    return state


def _check_tiles(name: str, module: Any, config: ReRAMConfig) -> None:
    rows = module.weight.numel() // channels(module)[0]
    tiles = math.ceil(rows / (config.tile_size or rows)) if rows else 0
    if tiles > MAX_TILES:
        raise ValueError(
            f"ReRAMConfig.tile_size={config.tile_size!r}: layer {name!r} with {rows} rows would have {tiles} tiles, "
            f"allowed are {MAX_TILES}"
        )


class _BeginForward:
    """Forward pre-hook of a patched model; a class, so that the model can still be pickled and deep-copied."""

    def __init__(self, state: CrossbarState):
        self.state = state

    def __call__(self, module, args, kwargs):
        self.state.begin_forward(module.training and not self.state.digital, args, kwargs)


def initialize_layers(model: nn.Module, names: set[str] | None = None) -> None:
    """Set the buffers of the given layers (None: all) from their weights alone, as before any calibration."""
    for name, layer in crossbar_layers(model).items():
        if names is not None and name not in names:
            continue
        config = layer.crossbar.config
        if layer.weight.device.type == "meta":
            continue
        with torch.no_grad():
            for buffer, fill in FILLS.items():
                getattr(layer, buffer).fill_(fill)
            shrink = 1.0 if config.range_shrink == "auto" else config.range_shrink
            layer.range_shrink.fill_(shrink)
            layer.gain.fill_(initial_gain(config, config.device.b(shrink)))
            layer.weight_scale.copy_(layer_scales(layer, layer._rows(layer.cell_weight()), config.weight_clip))
        layer.scalars()
        if config.learn_input_range and not isinstance(layer.input_range, nn.Parameter):
            make_range_trainable(layer)


def make_range_trainable(layer: CrossbarMixin) -> None:
    """Turn the buffer ``input_range`` into a parameter of the same name."""
    value = layer.input_range
    del layer._buffers["input_range"]
    layer.register_parameter("input_range", nn.Parameter(value.clone()))


def initial_gain(config: ReRAMConfig, b: float) -> float:
    """The read-out gain times b, as far as it is known without data."""
    if config.gain == "small_signal":
        return 1.0
    return b * (full_scale_gain(b) if config.gain == "full_scale" else uniform_gain(b))


def unpatch_model(model: Any) -> nn.Module:
    """Take all layers off the crossbars: gives back the digital model, bit for bit, in place.

    Raises:
        ValueError: the model is not patched.
    """
    crossbar_state(model)
    wrapped, model = model, without_adapters(model)
    for layer in [m for m in model.modules() if isinstance(m, CrossbarMixin)]:  # PEFT's modules_to_save are copies
        layer.remove_crossbar()
        layer.__class__ = layer.__dict__.pop("_digital_class")
    for module in model.modules():
        if module.__dict__.pop("_was_inplace", False):
            module.inplace = True
    model._crossbar_hook.remove()
    del model._crossbar_hook
    for module in model.modules():
        for detach in ON_UNPATCH:
            detach(module)
    return wrapped
