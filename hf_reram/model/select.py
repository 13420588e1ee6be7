"""Which layers of a model go on crossbars, and which stay digital and why."""

from typing import Any

import regex
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..config import ReRAMConfig
from ..nn import CrossbarConv1D, CrossbarConv2d, CrossbarConv2dSame, CrossbarLinear
from .adapters import adapted_layers

logger = logging.get_logger(__name__)

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


def select_layers(model: nn.Module, config: ReRAMConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` puts on crossbars, by qualified name; see :func:`patch_model`."""
    tied = _tied_names(model)
    inside_attention = {
        f"{name}.{child}" if name else child
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention)  # reads its projections' weights without calling them
        for child, _ in m.named_children()
    }
    adapters = tuple(
        f"{name}.{child}."
        for name, layer in adapted_layers(model).items()
        for child, _ in layer.named_children()
        if child != "base_layer"
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
        if crossbar_class(module) is None:
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


def crossbar_class(module: nn.Module) -> type | None:
    known = _BY_NAME.get((type(module).__module__.partition(".")[0], type(module).__name__))
    if known is not None:
        return known
    for digital, crossbar in _CROSSBARS.items():
        if isinstance(module, digital) and type(module).forward is digital.forward:
            return crossbar
    return None


def channels(module: Any) -> tuple[int, int]:
    """Of the output and of the input."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels
    rows = module.weight.shape
    return (rows[1], rows[0]) if isinstance(module, Conv1D) else (rows[0], rows[1])
