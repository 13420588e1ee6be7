"""Tells transformers of hf_reram's quantizer and pipelines, and PEFT and lm-evaluation-harness of crossbars, as soon as
these have the modules to be told.

``transformers.quantizers.auto`` takes half the time of torch and transformers together, and all of it is needed by
``from_pretrained`` alone. So nothing is imported here: a finder on ``sys.meta_path`` waits for transformers to import
the module, and our part of it follows then. A module that is there already is told at once.

Other threads may be importing hf_reram meanwhile, and wait for what this thread has begun. So transformers is told of
classes that stand in for ours, and import them when they are used.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from ..lazy import load
from ..model.hooks import ON_PATCH, ON_UNPATCH

METHOD = "reram"  # in config.json

# What is called with each module of transformers, once it is there.
_WAITING: dict[str, Callable[[Any], None]] = {}


def register_quantizer() -> None:
    """Let ``save_pretrained`` keep the crossbars of a patched model, PEFT's too, and ``from_pretrained`` bring them
    back."""
    if _attach not in ON_PATCH:
        ON_PATCH.append(_attach)
        ON_UNPATCH.append(_detach)
    _when_imported("transformers.quantizers.auto", _tell_quantizers)
    _when_imported("peft.peft_model", _tell_adapters)


def _attach(model: Any, config: Any) -> None:
    """Of a model that is no PreTrainedModel, such as a SentenceTransformer, those in it are saved by themselves."""
    for part in _pretrained_in(model):
        load("hf_reram.integrations.quantizer", "attach")(part, config)


def _pretrained_in(module: Any) -> list[Any]:
    """The outermost PreTrainedModels with crossbars."""
    if _is_pretrained(module):
        return [module] if load("hf_reram.model.find", "crossbar_layers")(module) else []
    return [part for child in module.children() for part in _pretrained_in(child)]


def _detach(model: Any) -> None:
    if _is_pretrained(model):
        load("hf_reram.integrations.quantizer", "detach")(model)


def _is_pretrained(model: Any) -> bool:
    """Whether it is a PreTrainedModel; asked without importing transformers' models."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _tell_quantizers(auto: Any) -> None:
    """Register a config and a quantizer that give way to ours, unless that is done.

    Raises:
        ValueError: another package has taken the name.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ReRAMConfig(QuantizationConfigMixin):
        @classmethod
        def from_dict(cls, *args, **kwargs):
            return load("hf_reram.config", "ReRAMConfig").from_dict(*args, **kwargs)

    class ReRAMQuantizer(HfQuantizer):
        def __new__(cls, *args, **kwargs) -> Any:
            return load("hf_reram.integrations.quantizer", "ReRAMQuantizer")(*args, **kwargs)

    for known, register, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, ReRAMConfig),
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, ReRAMQuantizer),
    ):
        if METHOD not in known or not known[METHOD].__module__.startswith("hf_reram."):
            register(METHOD)(ours)
    _tell_of_two_configs(auto.AutoHfQuantizer)
    _tell_of_parts(auto)


def _is_ours(config: Any) -> bool:
    """Whether it is a ReRAMConfig; asked without importing ours."""
    return type(config).__module__ == "hf_reram.config"


def _tell_of_parts(auto: Any) -> None:
    """Have a ReRAMConfig found that stands in the config of a part, such as an encoder that was patched by itself:
    transformers looks into that of the whole and of its text decoder only. And have one heard in any form."""
    theirs = auto.get_hf_quantizer
    if theirs.__module__ == __name__:
        return

    def get_hf_quantizer(config, quantization_config=None, *args, **kwargs):
        known = (config, config.get_text_config(decoder=True))
        if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == METHOD:
            quantization_config = load("hf_reram.config", "ReRAMConfig").from_dict(quantization_config)
        for part in known:
            stored: Any = getattr(part, "quantization_config", None)
            if _is_ours(stored):
                part.quantization_config = stored.to_dict()  # transformers asks for its keys
        if all(getattr(part, "quantization_config", None) is None for part in known):
            for part in list(vars(config).values()):
                stored = getattr(part, "quantization_config", None)
                if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
                    config.quantization_config = stored
        return theirs(config, quantization_config, *args, **kwargs)

    modules: list[Any] = [auto, sys.modules.get("transformers.modeling_utils")]
    for module in modules:
        if module is not None:
            module.get_hf_quantizer = get_hf_quantizer


def _tell_of_two_configs(quantizers: Any) -> None:
    """Have a ReRAMConfig heard that ``from_pretrained`` is given for a checkpoint with one, which transformers would
    put aside with a warning; other methods' configs go transformers' way."""
    theirs = quantizers.merge_quantization_configs
    if theirs.__func__.__module__ == __name__:
        return

    def merge_quantization_configs(cls, quantization_config, quantization_config_from_args):
        if not _is_ours(quantization_config_from_args):
            return theirs(quantization_config, quantization_config_from_args)
        return load("hf_reram.integrations.quantizer", "merged")(quantization_config, quantization_config_from_args)

    quantizers.merge_quantization_configs = classmethod(merge_quantization_configs)


def _tell_adapters(peft_model: Any) -> None:
    """Have the crossbars saved beside adapters, which PEFT saves alone."""
    theirs = peft_model.PeftModel.save_pretrained
    if theirs.__module__ == __name__:
        return

    @functools.wraps(theirs, assigned=("__name__", "__qualname__", "__doc__"))
    def save_pretrained(self, save_directory, *args, **kwargs):
        theirs(self, save_directory, *args, **kwargs)
        given = inspect.signature(theirs).bind(self, save_directory, *args, **kwargs).arguments
        if given.get("is_main_process", True) and load("hf_reram.model.find", "crossbar_layers")(self):
            load("hf_reram.hub.crossbars", "save_crossbars")(self, save_directory)
            if not (Path(save_directory) / "config.json").exists():  # else figures are of the whole model there
                load("hf_reram.integrations.saving", "forget_beside_adapters")(
                    self, Path(save_directory), kwargs.get("state_dict")
                )

    peft_model.PeftModel.save_pretrained = save_pretrained


def register_harness() -> None:
    """Let lm-evaluation-harness find the model type "reram", and say in its results whether crossbars were on."""
    _when_imported("lm_eval.models", _tell_harness)
    _when_imported("lm_eval.models.huggingface", _tell_results)


def _tell_harness(_: Any) -> None:
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if METHOD not in registry:
        registry.register(METHOD, target="hf_reram.integrations.harness:ReRAMLM")


def _tell_results(huggingface: Any) -> None:
    theirs = huggingface.HFLM.get_model_info
    if theirs.__module__ == __name__:
        return

    @functools.wraps(theirs, assigned=("__name__", "__qualname__", "__doc__"))
    def get_model_info(self):
        return {**theirs(self), "crossbars": load("hf_reram.integrations.harness", "crossbars_of")(self)}

    huggingface.HFLM.get_model_info = get_model_info


def register_pipelines() -> None:
    """Let ``transformers.pipeline`` answer questions."""
    _when_imported("transformers.pipelines", _tell_pipelines)


def wants_pipelines() -> bool:
    """Whether :func:`register_pipelines` was called."""
    return "transformers.pipelines" in _WAITING


def _tell_pipelines(_: Any) -> None:
    ours: Any = importlib.import_module("hf_reram.integrations.pipeline")
    # While it is being imported itself, which is what made transformers import its part, it registers at its end.
    if hasattr(ours, "register"):
        ours.register()


def _when_imported(name: str, tell: Callable[[Any], None]) -> None:
    _WAITING[name] = tell
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    # Where a thread has begun with the package, it may have looked for the module before there was the finder.
    begun = {name, name.rpartition(".")[0]} - {"transformers"}
    if begun & sys.modules.keys():
        tell(importlib.import_module(name))


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
        _WAITING[module.__name__](module)
