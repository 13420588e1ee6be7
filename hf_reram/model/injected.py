"""Code of a script's own that libraries' modules run although none of them, and no class, holds it."""

import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .code import functions_in, globals_of, own_functions
from .installed import is_installed

# By attributes of transformers' configs: where functions are registered under the names that these give.
REGISTRIES = {
    "_attn_implementation": (
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ),
    "_experts_implementation": (("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),),
}
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def hooks_of(module: nn.Module) -> list[Any]:
    """A script's hooks around a module's forward, those of accelerate among them."""
    accelerate = vars(module).get("_hf_hook")
    hooks = [*(hook for name in HOOKS for hook in getattr(module, name).values())]
    hooks += [] if accelerate is None else [accelerate, *getattr(accelerate, "hooks", ())]
    return [hook for hook in hooks if _is_own(hook)]


def hooks_of_all() -> list[Any]:
    """A script's hooks around all modules' forwards."""
    return [hook for name in HOOKS for hook in getattr(torch_module, f"_global{name}").values() if _is_own(hook)]


def registered(config: Any) -> Iterator[tuple[str, Any]]:
    """A script's functions that modules find by names in their config, such as that of their attention, each with the
    attribute that has the name. Those of libraries differ in their last bits alone."""
    for attribute, registries in REGISTRIES.items():
        name = getattr(config, attribute, None)
        for place, registry in registries if isinstance(name, str) else ():
            function = getattr(sys.modules.get(place), registry, {}).get(name)
            if _is_own(function):
                yield attribute, function


def put_in_place(cls: type) -> Iterator[tuple[str, Any]]:
    """A script's functions in place of those of a library's module that a class's methods call there, or what these
    call there, by their names."""
    methods = [method for part in vars(cls).values() for method in functions_in(part)]
    todo = [method for method in methods if is_installed(method.__globals__.get("__name__"))]
    seen: set[int] = set()
    while todo:
        function = todo.pop()
        for name in globals_of(function.__code__):
            value = function.__globals__.get(name)
            if id(value) in seen or not (callable(value) and not isinstance(value, type)):
                continue
            seen.add(id(value))
            if _is_own(value):
                yield name, value
            elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                todo.append(value)


def _is_own(value: Any) -> bool:
    return bool(own_functions(value)) or not is_installed(type(value).__module__)
