"""A model's crossbar layers and their states, found by walking the model as it is now, whatever wraps it."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..nn import CrossbarLayer
from ..nn.places import Part, parameter_of
from ..nn.state import CrossbarState
from .adapters import has_adapters

# Names under which wrappers hold the module that they wrap: torch.compile, FSDP1, activation checkpointing, PEFT.
TRANSPARENT = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"))


# Those that hold it as ``module``.
WRAPPERS = (DataParallel, DistributedDataParallel)


def unwrapped(model: Any) -> Any:
    """The model that DDP, DataParallel, torch.compile, FSDP1 or PEFT have wrapped."""
    while True:
        children = getattr(model, "_modules", {})
        name = next((name for name in children if name in TRANSPARENT), None)
        if isinstance(model, WRAPPERS):
            model = model.module
        elif name is not None:
            model = children[name]
        elif has_adapters(model):
            model = model.get_base_model()
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has wrapped the model or a part of it, or compiles its calls."""
    modules: Any = model.modules()
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by the qualified names that they would have if nothing wrapped the model or parts of it, each once.
    Of a module that PEFT trains beside a copy (``modules_to_save``) the one that is in use.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: allowed is a torch.nn.Module")
    yield from _walk(unwrapped(model), "", set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for key, child in _children(module):
        yield from _walk(child, ".".join(part for part in (name, key) if part), seen)


def _children(module: Any) -> list[tuple[str, nn.Module]]:
    children = {key: child for key, child in module._modules.items() if child is not None}
    if "original_module" in children and "modules_to_save" in children:  # PEFT's AuxiliaryTrainingWrapper
        active = [name for name in module.active_adapters if name in children["modules_to_save"]]
        if active and not module.disable_adapters:
            return [("", children["modules_to_save"][active[-1]])]
        return [("", children["original_module"])]
    wraps = isinstance(module, WRAPPERS)
    return [
        ("" if key in TRANSPARENT or (wraps and key == "module") else key, child) for key, child in children.items()
    ]


def crossbar_layers(model: nn.Module) -> dict[str, CrossbarLayer]:
    """The model's crossbar layers as it is now, by their qualified name without wrappers (DDP, torch.compile, PEFT)."""
    return {name: module for name, module in walk(model) if isinstance(module, CrossbarLayer)}


def patched_layers(model: nn.Module) -> dict[str, CrossbarLayer]:
    """:func:`crossbar_layers`, of which there must be some.

    Raises:
        ValueError: the model is not patched.
    """
    if not (layers := crossbar_layers(model)):
        raise ValueError(
            f"{type(model).__name__} has no crossbar layers: call patch_model(model, ReRAMConfig(...)) first"
        )
    return layers


def crossbar_states(model: nn.Module) -> list[CrossbarState]:
    """The states of the model's crossbar layers: one for each part that was patched by itself.

    Raises:
        ValueError: the model is not patched.
    """
    return list({id(layer.crossbar): layer.crossbar for layer in patched_layers(model).values()}.values())


def crossbar_state(model: nn.Module) -> CrossbarState:
    """The state that the model's crossbar layers share; of several, that of the first layer.

    Raises:
        ValueError: the model is not patched.
    """
    return crossbar_states(model)[0]


def arrays(layers: Mapping[str, CrossbarLayer]) -> list[list[str]]:
    """Names of the layers whose weight is one parameter, and whose cells are the same, in their order."""
    found: dict[tuple[int, str], list[str]] = {}
    for name, layer in layers.items():
        weight = parameter_of(layer)  # one that is computed is another tensor each time
        part = repr(layer.index) if isinstance(layer, Part) else ""
        found.setdefault((id(layer if weight is None else weight), part), []).append(name)
    return list(found.values())


def chip_names(model: nn.Module) -> dict[CrossbarLayer, str]:
    """The names that chips' seeds are made of: a Hugging Face encoder has the same alone and inside a model with a
    head, where it stands under its ``base_model_prefix``. Layers that share a weight share its cells, those of the
    first of them. Copies that PEFT has beside the one in use are on the chip too, and in its place if they are switched
    to."""
    base = unwrapped(model)
    prefix = getattr(base, "base_model_prefix", "")
    alone = prefix and getattr(base, "base_model", None) is base
    layers = crossbar_layers(model)
    first = {name: same[0] for same in arrays(layers) for name in same}
    names = {layer: first[name] for name, layer in layers.items()}
    for module in base.modules():
        if isinstance(module, CrossbarLayer):
            names.setdefault(module, module.crossbar_name)
    return {layer: f"{prefix}.{name}" if alone else name for layer, name in names.items()}


def is_digital(model: nn.Module) -> bool:
    """Whether any part of the model computes digitally now, as inside :func:`hf_reram.digital`."""
    return any(state.digital for state in crossbar_states(model))


def is_chip(model: nn.Module) -> bool:
    """Whether any layer of the model is deployed as a chip now."""
    return any(layer.chip is not None for layer in crossbar_layers(model).values())


def uncalled(model: nn.Module, digitally: bool = False) -> list[str]:
    """Names of the crossbar layers that have not run on their cells since :func:`reset_calls`, or ``digitally``, and of
    those that are none any more."""
    layers = crossbar_layers(model)
    silent = [name for name, layer in layers.items() if not (layer.counter.digital_calls if digitally else layer.calls)]
    return silent + replaced(model)


def around(model: nn.Module) -> dict[str, CrossbarLayer]:
    """The crossbar layers that were patched together with the model's and are outside of it, as a head is of which it
    is the encoder."""
    inside = set(crossbar_layers(model).values())
    roots = [state.root for state in crossbar_states(model) if state.root is not None]
    return {name: layer for root in roots for name, layer in crossbar_layers(root).items() if layer not in inside}


def calls_around(model: nn.Module) -> dict[CrossbarLayer, int]:
    """How often the layers :func:`around` the model have run, of those that are on no chip themselves."""
    return {layer: layer.calls for layer in around(model).values() if layer.chip is None}


def ran_around(model: nn.Module, before: Mapping[CrossbarLayer, int]) -> list[str]:
    """Names of the layers :func:`around` the model that have run since :func:`calls_around`."""
    return [name for name, layer in around(model).items() if layer.calls != before.get(layer, layer.calls)]


def replaced(model: nn.Module) -> list[str]:
    """Names of layers that were put on crossbars and have a digital layer in their place now."""
    inside, layers = set(model.modules()), crossbar_layers(model).values()
    found: list[str] = []
    for state in {layer.crossbar: None for layer in layers}:
        if state.root in inside:
            found += sorted(state.names - {layer.crossbar_name for layer in layers if layer.crossbar is state})
    return found


def reset_calls(model: nn.Module) -> None:
    """Count the layers' calls, and the model's, from 0."""
    for layer in crossbar_layers(model).values():
        layer.calls = layer.crossbar.calls = 0


def ran(model: nn.Module) -> bool:
    """Whether the model, or any of its crossbar layers, has run since :func:`reset_calls`."""
    return any(
        layer.calls or layer.counter.digital_calls or layer.crossbar.calls for layer in crossbar_layers(model).values()
    )
