"""Put a model's layers on crossbars in place, and take them off again."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.iv import full_scale_gain, uniform_gain
from ..nn import CrossbarLayer
from ..nn.array import cell_weight
from ..nn.hooks import BeginForward, EndForward, argument_names, is_given_tokens
from ..nn.layer import FILLS
from ..nn.mapping import layer_scales
from ..nn.places import place
from ..nn.registry import crossbar_class
from ..nn.state import CrossbarState
from ..nn.tensors import whole
from .bypass import OFFLOADED, call_layers, left_digital, read_layers, renew_methods
from .find import crossbar_layers, crossbar_state, crossbar_states, is_chip, unwrapped, walk
from .hooks import ON_PATCH, ON_UNPATCH
from .open import close_unused, opened
from .reconfigure import watch
from .select import select_layers
from .sharding import gathered
from .summary import summarize

logger = logging.get_logger(__name__)

MAX_TILES = 1024  # of a layer


def patch_model(model: nn.Module, config: ReRAMConfig) -> nn.Module:
    """Put every layer that ``config`` selects on a crossbar, in place, and return the model.

    ``nn.Linear`` becomes :class:`CrossbarLinear`, ``nn.Conv2d`` :class:`CrossbarConv2d`, GPT-2's ``Conv1D``
    :class:`CrossbarConv1D`, by class swap: no weight is copied and every state-dict key stays. Experts that are stacked
    in one tensor (transformers' experts interface) and the projections of ``nn.MultiheadAttention`` become layers of
    their own inside, whose weights are parts of what is there. Embeddings and layers
    tied to them stay digital, and so do PEFT's adapters beside a crossbar. Input ranges are set by
    :func:`hf_reram.calibrate`; until then each batch spans its own, or each token where ``input_range`` is
    "per_token". The model keeps a copy of ``config``: what changes in it later has no effect, and says so;
    :func:`hf_reram.reconfigure` changes what can be changed.

    Raises:
        ValueError: the model is patched already, nothing is left to patch, a name in ``target_modules`` or
            ``modules_to_not_convert`` matches nothing, or a weight is NaN or infinite.
        TypeError: ``config`` is no ReRAMConfig.
    """
    if not isinstance(config, ReRAMConfig):
        raise TypeError(f"config={config!r}: allowed is a ReRAMConfig")
    base = unwrapped(model)
    swap_layers(base, config)
    try:
        initialize_layers(base)
        for attach in ON_PATCH:
            attach(base, crossbar_state(base).config)
    except BaseException:
        _take_off(base)
        raise
    watch(config, base)
    logger.info("%s", summarize(base))
    return model


@torch.inference_mode(False)  # training may follow
def swap_layers(model: Any, config: ReRAMConfig, stored: bool = False) -> None:
    """Swap the classes of the selected layers and register their buffers, also on the meta device: all or none.
    ``stored``: see :func:`.select.select_layers`."""
    if crossbar_layers(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch_model(model) first")
    with opened(model):
        _swap(model, config, stored)


def _swap(model: Any, config: ReRAMConfig, stored: bool) -> None:
    selected: dict[str, Any] = select_layers(model, config, stored)
    if not selected:
        return
    for name, module in selected.items():
        if module.weight.device.type != "meta" and not torch.isfinite(whole(module.weight.detach())).all():
            raise ValueError(f"the weight of layer {name!r} holds NaN or infinite values")
    own = ReRAMConfig.from_dict(config.to_dict())
    if away := {name for name, why in left_digital(model).items() if why == OFFLOADED}:  # saved, they could be on cells
        own.modules_to_not_convert = sorted({*(own.modules_to_not_convert or ()), *away})
    state = CrossbarState(own, model)
    try:
        for name, module in selected.items():
            module.__class__, digital = crossbar_class(module), type(module)
            module._digital_class = digital
            module.init_crossbar(state, name)
            renew_methods(module, digital)
            _check_tiles(name, module)
        state.names = frozenset(selected)
        call_layers(model)
        for module in model.modules():
            if getattr(module, "inplace", False) is True:  # would overwrite what a retention term still needs
                module.inplace, module._was_inplace = False, True
        _watch(model, state)
    except BaseException:
        _take_off(model)
        raise


def _check_tiles(name: str, layer: CrossbarLayer) -> None:
    if layer.tiles() > MAX_TILES:
        raise ValueError(
            f"ReRAMConfig.tile_size={layer.crossbar.config.tile_size!r}: layer {name!r} with {layer.width} rows would "
            f"have {layer.tiles()} tiles, allowed are {MAX_TILES}"
        )


def _watch(model: nn.Module, state: CrossbarState) -> None:
    """Tell the state when the model runs, and which tokens are padding in it and in its encoders and decoders."""
    inner = [m for _, m in walk(model) if m is not model and not isinstance(m, CrossbarLayer) and is_given_tokens(m)]
    module: Any
    for module in (model, *inner):
        begin = BeginForward(state, module, module is model, argument_names(module))
        module._crossbar_hooks = [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(EndForward(begin), always_call=True),
        ]


@torch.inference_mode(False)
def initialize_layers(model: nn.Module, names: set[str] | None = None) -> None:
    """Set the buffers of the given layers (None: all) from their weights alone, as before any calibration."""
    for name, layer in crossbar_layers(model).items():
        if names is not None and name not in names:
            continue
        config = layer.crossbar.config
        if layer.weight.device.type == "meta":
            continue
        with torch.no_grad(), gathered([layer]):
            for buffer, fill in FILLS.items():
                getattr(layer, buffer).fill_(fill)
            shrink = 1.0 if config.range_shrink == "auto" else config.range_shrink
            layer.range_shrink.fill_(shrink)
            layer.per_token.fill_(config.input_range == "per_token")
            layer.gain.fill_(initial_gain(config, config.device.b(shrink)))
            layer.weight_scale.copy_(
                layer_scales(layer, layer.to_rows(cell_weight(layer, layer.weight)), config.weight_clip)
            )
        layer.forget_white_noise()
        layer.scalars()
        layer.note_choice()
        if config.input_range == "learned" and not isinstance(layer.input_range, nn.Parameter):
            make_range_trainable(layer)


def make_range_trainable(layer: CrossbarLayer) -> None:
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
        ValueError: the model is not patched, deployed here, or has parametrizations on crossbars since.
    """
    if is_chip(model):
        raise ValueError("the model is deployed as a chip here: unpatch it outside of hf_reram.deploy")
    crossbar_states(model)
    base = unwrapped(model)
    if computed := [name for name, layer in crossbar_layers(base).items() if is_parametrized(place(layer)[0])]:
        raise ValueError(
            f"unpatch_model: parametrizations (weight norm, spectral norm, ...) stand on crossbar layers "
            f"{', '.join(computed)}: take them off first, as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    _take_off(base)
    return model


def take_layers_off(model: nn.Module, names: Iterable[str]) -> None:
    """Take some of a model's layers off their crossbars, and close modules that none is left in."""
    layers = crossbar_layers(model)
    for name in list(names):
        take_off(layers[name])
    close_unused(model.modules())


def take_off(layer: CrossbarLayer) -> None:
    """Take one layer off its crossbar."""
    if "crossbar" in layer.__dict__:  # else it failed to get one
        layer.crossbar.names -= {layer.crossbar_name}
    crossbar = type(layer)
    layer.remove_crossbar()
    renew_methods(layer, crossbar)


def _take_off(model: Any) -> None:
    read_layers(model)
    module: Any
    for module in list(model.modules()):  # PEFT's modules_to_save are copies
        if isinstance(module, CrossbarLayer):
            take_off(module)
        if module.__dict__.pop("_was_inplace", False):
            module.inplace = True
        for hook in module.__dict__.pop("_crossbar_hooks", ()):
            hook.remove()
        for detach in ON_UNPATCH:
            detach(module)
    close_unused(model.modules())
