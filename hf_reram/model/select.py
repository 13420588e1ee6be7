"""Which layers of a model go on crossbars, and which stay digital and why."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import regex
from torch import nn
from transformers.utils import logging

from ..config import SELECTION_FIELDS, ReRAMConfig
from ..device.checks import shown, some
from ..nn import CrossbarLayer
from ..nn.parts import Holder, holder_class
from ..nn.registry import crossbar_class, is_kind
from .bypass import left_digital
from .find import crossbar_layers, crossbar_states, walk
from .open import opened

logger = logging.get_logger(__name__)

_UNSUPPORTED: Any = (
    nn.Conv3d,
    nn.modules.conv._ConvTransposeNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
MATCHING = 1.0  # s of computing that a config's regular expression may take in all
LONGEST_PATTERN = 20_000  # characters

_TABLES: Any = (nn.Embedding, nn.utils.parametrize.ParametrizationList)


def select_layers(model: nn.Module, config: ReRAMConfig, stored: bool = False) -> dict[str, nn.Module]:
    """The layers that ``config`` puts on crossbars, by qualified name, also those that are there already; see
    :func:`patch_model`. ``stored``: the config is a checkpoint's, whose names may be those of a model with another
    head, or of one without."""
    with opened(model):
        return _select(model, config, stored)


def _select(model: nn.Module, config: ReRAMConfig, stored: bool) -> dict[str, nn.Module]:
    tied, adapters, bypassed = _tied_names(model), _adapters(model), left_digital(model)
    able: dict[str, nn.Module] = {}
    unable: dict[str, str] = {}  # and why
    for name, module in walk(model):
        if holder_class(module) is not None and name in bypassed:
            unable[name] = bypassed[name]
        if not is_kind(module) or name in tied or id(module) in adapters:
            continue
        if isinstance(module, CrossbarLayer):
            able[name] = module
        elif name in bypassed:
            unable[name] = bypassed[name]
        elif crossbar_class(module) is None:
            unable[name] = f"{type(module).__name__} has a forward, or a part of it, of its own"
        else:
            able[name] = module
    if left := unsupported(model):
        logger.warning("%s multiply by weights of kinds that are not put on crossbars, and stay digital", some(left))
    spelled = _spelled(model) if stored else _as_it_is
    chosen = _targets(able, unable, config.target_modules, spelled, stored)
    excluded = config.modules_to_not_convert or ()
    inside = _by_part((*able, *unable), spelled, _infixes) if excluded else {}
    everything = _by_part((name for name, _ in walk(model)), _as_it_is, _infixes) if excluded and not stored else {}
    for pattern in excluded:
        hit = inside.get(pattern, set())
        if not hit and not stored and pattern not in everything:
            raise ValueError(f"modules_to_not_convert={shown(pattern)} matches no module of {type(model).__name__}")
        chosen -= hit
    reasons = _grouped({name: why for name, why in unable.items() if name in chosen})
    chosen -= unable.keys()
    if not chosen and stored:
        logger.warning("none of the checkpoint's crossbar layers are in %s, which is digital", type(model).__name__)
        return {}
    if not chosen:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: of {len(able)} layers that could go on crossbars "
            f"target_modules={shown(config.target_modules)}, "
            f"modules_to_not_convert={shown(config.modules_to_not_convert)} "
            f"leave none{'; these stay digital: ' * bool(reasons)}{reasons}"
        )
    if reasons:
        logger.warning("these layers stay digital: %s", reasons)
    return {name: able[name] for name in able if name in chosen}


def lies_as(model: nn.Module, config: ReRAMConfig, stored: bool = False) -> bool:
    """Whether a patched model's layers lie on cells as ``config`` says, which may name the same layers in other words.

    Args:
        stored: see :func:`select_layers`.
    """
    hardware = [state.config.hardware() for state in crossbar_states(model)]
    asked = config.hardware()
    if any(own[name] != asked[name] for own in hardware for name in asked if name not in SELECTION_FIELDS):
        return False
    return all(own == asked for own in hardware) or (
        select_layers(model, config, stored).keys() == crossbar_layers(model).keys()
    )


def unsupported(model: nn.Module) -> list[str]:
    """Modules, by name and class, that multiply by weights which no crossbar layer can hold: other convolutions,
    attention with weights and a forward of its own, recurrent layers, experts stacked in one tensor that do not use
    transformers' interface."""
    return [
        f"{name} ({type(m).__name__})"
        for name, m in walk(model)
        if crossbar_class(m) is None
        and not isinstance(m, Holder)
        and holder_class(m) is None  # closed, by choice or for a reason that is named
        and (isinstance(m, _UNSUPPORTED) or (not is_kind(m) and not isinstance(m, _TABLES) and _stacked(m)))
    ]


def _stacked(module: nn.Module) -> bool:
    """Whether it holds matrices in one tensor. Positions, alike for all examples, have a first dimension of 1, and
    scales of attention heads have numbers for matrices."""
    return any(p.dim() > 2 and p.shape[0] > 1 and p[0].numel() > 1 for p in module.parameters(recurse=False))


def _as_it_is(name: str) -> list[str]:
    return [name]


def _spelled(model: Any) -> Callable[[str], list[str]]:
    """What a layer may be called in a checkpoint of transformers: with the encoder's name before it, and without."""
    prefix = getattr(model, "base_model_prefix", "")
    return lambda name: [name] if not prefix else [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]


def _targets(
    able: dict[str, nn.Module], unable: dict[str, str], target, spelled: Callable[[str], list[str]], stored: bool
) -> set[str]:
    names = [*able, *unable]
    if target is None or target == "all-linear":
        return set(names)
    if isinstance(target, str):
        hits = {target: _matched(target, {name: spelled(name) for name in names})}
    else:
        ends = _by_part(names, spelled, _suffixes)
        hits = {key: ends.get(key, set()) for key in target}
    for key, hit in hits.items() if not stored else ():
        if not hit:
            raise ValueError(f"target_modules={shown(key)} matches no layer; layers are {some(able)}")
        if hit <= unable.keys():
            reasons = _grouped({name: unable[name] for name in names if name in hit})
            raise ValueError(f"target_modules={shown(key)} matches only layers that stay digital: {reasons}")
    return set().union(*hits.values())


def _matched(pattern: str, forms: dict[str, list[str]]) -> set[str]:
    """The names of which the pattern matches a form. A config may come from anyone, and some expressions take forever:
    all matching together has :data:`MATCHING`.

    Raises:
        ValueError: the pattern is no regular expression, too long, or takes too long.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"target_modules has {len(pattern)} characters: allowed are {LONGEST_PATTERN}")
    end = time.process_time() + MATCHING
    try:
        compiled = regex.compile(pattern)
        return {
            name
            for name, written in forms.items()
            if any(compiled.fullmatch(form, timeout=max(end - time.process_time(), 1e-6)) for form in written)
        }
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"target_modules={shown(pattern)} is no regular expression: {error}") from error
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"target_modules={shown(pattern)} took too long to match: allowed are {MATCHING:g} s for all {len(forms)} "
            "layers together"
        ) from error


def _by_part(
    names: Iterable[str], spelled: Callable[[str], list[str]], parts: Callable[[str], Iterable[str]]
) -> dict[str, set[str]]:
    """Names by the parts of their forms, so that many patterns need not be compared with each name."""
    found: dict[str, set[str]] = {}
    for name in names:
        for part in {part for form in spelled(name) for part in parts(form)}:
            found.setdefault(part, set()).add(name)
    return found


def _suffixes(name: str) -> Iterable[str]:
    """``a.b.c``, ``b.c`` and ``c``."""
    words = name.split(".")
    return (".".join(words[i:]) for i in range(len(words)))


def _infixes(name: str) -> Iterable[str]:
    """What :func:`_suffixes` gives of ``a``, ``a.b`` and ``a.b.c``."""
    words = name.split(".")
    return (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))


def _grouped(unable: dict[str, str]) -> str:
    """Names by the reason that they share."""
    reasons: dict[str, list[str]] = {}
    for name, why in unable.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"{some(names)} ({why})" for why, names in reasons.items())


def _tied_names(model: Any) -> set[str]:
    """Layers whose weight is an embedding's, or will be once transformers ties it."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {name for name, m in walk(model) if is_kind(m) and id(m.weight) in embeddings}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        names |= {key.removesuffix(".weight") for key in (target, source)}
    return names


def _adapters(model: nn.Module) -> set[int]:
    """What PEFT has put beside a base layer."""
    beside = [
        child
        for m in model.modules()
        if "base_layer" in m._modules
        for n, child in m.named_children()
        if n != "base_layer"
    ]
    return {id(m) for child in beside for m in child.modules()}
