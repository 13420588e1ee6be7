"""Put a model's layers on crossbars in place, and take them off again."""

import math
from dataclasses import dataclass
from typing import Any

import regex
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .config import ReRAMConfig
from .device.iv import full_scale_gain, uniform_gain
from .mapping import layer_scales
from .nn import CrossbarConv1D, CrossbarConv2d, CrossbarConv2dSame, CrossbarLinear, CrossbarMixin
from .nn.mixin import FILLS
from .nn.state import CrossbarState

logger = logging.get_logger(__name__)

# Through which transformers' push_to_hub and save_pretrained upload, see hf_reram.hub.
UPLOAD = "_upload_modified_files"

MAX_TILES = 1024  # of a layer

# By exact forward: a subclass with a forward of its own computes something else and stays digital.
_CROSSBARS: dict[Any, type] = {nn.Linear: CrossbarLinear, nn.Conv2d: CrossbarConv2d, Conv1D: CrossbarConv1D}
_KINDS: Any = tuple(_CROSSBARS)
_UNSUPPORTED: Any = (nn.Conv1d, nn.Conv3d, nn.modules.conv._ConvTransposeNd, nn.MultiheadAttention, nn.RNNBase)
_TABLES: Any = (nn.Embedding, nn.utils.parametrize.ParametrizationList)
# Subclasses with a forward of their own that is known, by package and name, so that the package need not be there.
_BY_NAME = {
    ("timm", "Conv2dSame"): CrossbarConv2dSame,
    ("timm", "Linear"): CrossbarLinear,
    ("transformers", "FalconLinear"): CrossbarLinear,
}


def crossbar_layers(model: nn.Module) -> dict[str, CrossbarMixin]:
    """The model's crossbar layers by their qualified name in the patched model, whatever wraps it now (DDP, PEFT)."""
    return {m.crossbar_name: m for m in model.modules() if isinstance(m, CrossbarMixin)}


def crossbar_state(model: nn.Module) -> CrossbarState:
    """The state that the model's crossbar layers share.

    Raises:
        ValueError: the model is not patched.
    """
    for layer in crossbar_layers(model).values():
        return layer.crossbar
    raise ValueError(f"{type(model).__name__} has no crossbar layers: call patch_model(model, ReRAMConfig(...)) first")


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
    base = _without_adapters(model)
    swap_layers(base, config)
    initialize_layers(base)
    attach_config(base, config)
    logger.info("%s", summarize(base))
    return model


def _without_adapters(model: Any) -> Any:
    """The model that PEFT has wrapped, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def attach_config(model: Any, config: ReRAMConfig) -> None:
    """Let a PreTrainedModel's ``save_pretrained`` write the config into config.json, and its ``push_to_hub`` upload
    report and card."""
    from .hub import attach_upload
    from .quantizer import ReRAMQuantizer

    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        model.config.quantization_config = config
        model.hf_quantizer = ReRAMQuantizer(config, pre_quantized=False)
        attach_upload(model)


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
        module.__class__ = _crossbar_class(module)
        module._digital_class = digital
        module.init_crossbar(state, name, *_channels(module))
    for module in model.modules():
        if getattr(module, "inplace", False) is True:  # would overwrite the output that a retention term still needs
            module.inplace, module._was_inplace = False, True
    model._crossbar_hook = model.register_forward_pre_hook(_BeginForward(state), with_kwargs=True)
    return state


def _check_tiles(name: str, module: Any, config: ReRAMConfig) -> None:
    rows = module.weight.numel() // _channels(module)[0]
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
    wrapped, model = model, _without_adapters(model)
    for layer in [m for m in model.modules() if isinstance(m, CrossbarMixin)]:  # PEFT's modules_to_save are copies
        layer.remove_crossbar()
        layer.__class__ = layer.__dict__.pop("_digital_class")
    for module in model.modules():
        if module.__dict__.pop("_was_inplace", False):
            module.inplace = True
    model._crossbar_hook.remove()
    del model._crossbar_hook
    config = getattr(model, "config", None)
    for owner, name in ((model, "hf_quantizer"), (model, UPLOAD), (config, "quantization_config")):
        if name in getattr(owner, "__dict__", {}):
            delattr(owner, name)
    return wrapped


# Selection


def select_layers(model: nn.Module, config: ReRAMConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` puts on crossbars, by qualified name; see :func:`patch_model`."""
    tied = _tied_names(model)
    inside_attention = {
        f"{name}.{child}" if name else child
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention)  # reads its projections' weights without calling them
        for child, _ in m.named_children()
    }
    adapted: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    adapters = tuple(
        f"{name}.{child}." for name, m in adapted.items() for child, _ in m.named_children() if child != "base_layer"
    )
    able: dict[str, nn.Module] = {}
    unable = []
    module: Any
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or name in tied or name in inside_attention:
            continue
        if f"{name}.".startswith(adapters):
            continue
        name = name.replace(".base_layer", "")  # PEFT's, so that the layer has one name with adapters and without
        if _crossbar_class(module) is None:
            unable.append(f"{name} ({type(module).__name__})")
        else:
            able[name] = module
    if left := unsupported(model):
        logger.warning("%s multiply by weights of kinds that are not put on crossbars, and stay digital", _some(left))
    if unable:
        logger.warning("layers of these classes have a forward of their own and stay digital: %s", ", ".join(unable))
    chosen = _targets(able, config.target_modules)
    for pattern in config.modules_to_not_convert or ():
        hit = {name for name in able if f".{pattern}." in f".{name}."}
        if not hit and not any(f".{pattern}." in f".{name}." for name, _ in model.named_modules()):
            raise ValueError(f"modules_to_not_convert={pattern!r} matches no module of {type(model).__name__}")
        chosen -= hit
    if not chosen:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: of {len(able)} layers that could go on crossbars "
            f"target_modules={config.target_modules!r}, modules_to_not_convert={config.modules_to_not_convert!r} "
            "leave none"
        )
    return {name: able[name] for name in able if name in chosen}


def unsupported(model: nn.Module) -> list[str]:
    """Modules, by name and class, that multiply by weights which no crossbar layer can hold: other convolutions,
    attention with weights of its own, recurrent layers, experts stacked in one tensor."""
    return [
        f"{name} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, _UNSUPPORTED) or (not isinstance(m, (*_KINDS, *_TABLES)) and _stacked(m))
    ]


def _stacked(module: nn.Module) -> bool:
    """Whether it holds matrices in one tensor. Positions, alike for all examples, have a first dimension of 1."""
    return any(p.dim() > 2 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def _targets(able: dict[str, nn.Module], target) -> set[str]:
    if target is None or target == "all-linear":
        return set(able)
    if isinstance(target, str):
        try:  # a config may come from anyone, and some expressions take forever
            chosen = {name for name in able if regex.fullmatch(target, name, timeout=1.0)}
        except regex.error as error:
            raise ValueError(f"target_modules={target!r} is no regular expression: {error}") from error
        except TimeoutError as error:
            raise ValueError(f"target_modules={target!r} took too long to match: allowed is a second a name") from error
        if not chosen:
            raise ValueError(f"target_modules={target!r} matches no layer; layers are {_some(able)}")
        return chosen
    chosen = set()
    for key in target:
        hit = {name for name in able if name == key or name.endswith(f".{key}")}
        if not hit:
            raise ValueError(f"target_modules={key!r} matches no layer; layers are {_some(able)}")
        chosen |= hit
    return chosen


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def _tied_names(model: Any) -> set[str]:
    """Layers whose weight is an embedding's, or will be once transformers ties it."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {n for n, m in model.named_modules() if isinstance(m, _KINDS) and id(m.weight) in embeddings}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        names |= {key.removesuffix(".weight") for key in (target, source)}
    return names


def _crossbar_class(module: nn.Module) -> type | None:
    known = _BY_NAME.get((type(module).__module__.partition(".")[0], type(module).__name__))
    if known is not None:
        return known
    for digital, crossbar in _CROSSBARS.items():
        if isinstance(module, digital) and type(module).forward is digital.forward:
            return crossbar
    return None


def _channels(module: Any) -> tuple[int, int]:
    """Of the output and of the input."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels
    rows = module.weight.shape
    return (rows[1], rows[0]) if isinstance(module, Conv1D) else (rows[0], rows[1])


# Summary


@dataclass(frozen=True)
class CrossbarSummary:
    """What of a model is on crossbars.

    Attributes:
        device: name of the cell technology. layers: crossbar layers. cells: ReRAM cells, two a weight and pair.
        weights: weights on crossbars. parameters: all of the model's parameters.
        calibrated: layers that have an input range.
        digital: modules with matrices of their own that stay digital, by name and class.
    """

    device: str
    layers: int
    cells: int
    weights: int
    parameters: int
    calibrated: int
    digital: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the model's parameters on crossbars."""
        return self.weights / max(self.parameters, 1)

    def __str__(self) -> str:
        return (
            f"{self.layers} crossbar layers on {self.device} ({self.calibrated} calibrated): {self.cells:,} cells hold "
            f"{self.weights:,} weights, {100 * self.share:.1f} % of the model's {self.parameters:,} parameters"
        )


def summarize(model: nn.Module) -> CrossbarSummary:
    """Count the model's crossbar layers and cells.

    Raises:
        ValueError: the model is not patched.
    """
    state, layers = crossbar_state(model), crossbar_layers(model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    ranges = sum(p.numel() for name, p in model.named_parameters() if name.endswith("input_range"))
    digital = tuple(
        f"{name} ({type(m).__name__})"
        for name, m in model.named_modules()
        if not isinstance(m, CrossbarMixin) and any(p.dim() > 1 for p in m.parameters(recurse=False))
    )
    return CrossbarSummary(
        device=state.config.device.name,
        layers=len(layers),
        cells=sum(layer.cells for layer in layers.values()),
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()) - ranges,
        calibrated=sum(layer.weight.device.type != "meta" and layer.calibrated for layer in layers.values()),
        digital=digital,
    )
