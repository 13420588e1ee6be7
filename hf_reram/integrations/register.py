"""Tells transformers of hf_reram's quantizer and pipelines, as soon as transformers has the modules to be told.

``transformers.quantizers.auto`` takes half the time of torch and transformers together, and all of it is needed by
``from_pretrained`` alone. So nothing is imported here: a finder on ``sys.meta_path`` waits for transformers to import
the module, and our part of it follows then. A module that is there already is told at once.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from ..model.hooks import ON_PATCH, ON_UNPATCH

# Modules of transformers, and the module of ours whose ``register`` tells each.
_WAITING: dict[str, str] = {}


def register_quantizer() -> None:
    """Let ``save_pretrained`` keep the crossbars of a patched model, and ``from_pretrained`` bring them back."""
    if _attach not in ON_PATCH:
        ON_PATCH.append(_attach)
        ON_UNPATCH.append(_detach)
    _register_with("transformers.quantizers.auto", "hf_reram.integrations.quantizer")


def _attach(model: Any, config: Any) -> None:
    if _is_pretrained(model):
        from .quantizer import attach

        attach(model, config)


def _detach(model: Any) -> None:
    if _is_pretrained(model):
        from .quantizer import detach

        detach(model)


def _is_pretrained(model: Any) -> bool:
    """Whether it is a PreTrainedModel; asked without importing transformers' models."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def register_pipelines() -> None:
    """Let ``transformers.pipeline`` answer questions."""
    _register_with("transformers.pipelines", "hf_reram.integrations.pipeline")


def is_waiting(ours: str) -> bool:
    """Whether a module of ours is to be registered, now or when transformers has imported its part."""
    return ours in _WAITING.values()


def _register_with(theirs: str, ours: str) -> None:
    _WAITING[theirs] = ours
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    # Where a thread has begun with the package, it may have looked for the module before there was the finder.
    begun = {theirs, theirs.rpartition(".")[0]} - {"transformers"}
    if begun & sys.modules.keys():
        importlib.import_module(theirs)
        _tell(theirs)


def _tell(theirs: str) -> None:
    module = importlib.import_module(_WAITING[theirs])
    # While it is being imported itself, which is what made transformers import its part, it registers at its end.
    if hasattr(module, "register"):
        module.register()


class _Finder:
    """Finds the modules that are waited for as the finders after it do. It stays for modules that are reloaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _WAITING:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # type: ignore[arg-type]
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads a module as its own loader does, which then takes this one's place, and tells it."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _tell(module.__name__)
