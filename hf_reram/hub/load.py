"""A checkpoint's model, from the Hub or a folder, whatever its class."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from ..config import ReRAMConfig
from ..device.checks import read_json, shown, some
from ..model.find import crossbar_layers
from .crossbars import put_on, stored_crossbars
from .report import attach_report, stored_report
from .whole import (
    held_back,
    missing_from,
    refuse_digital,
    refuse_misplaced,
    refuse_misshaped,
    refuse_random,
    weights_of,
)

logger = logging.get_logger(__name__)

UNREADABLE = (SafetensorError, StrictDataclassError)
ADAPTER, CONFIG = "adapter_config.json", "config.json"
ASKED = "quantization_config"
# By the task of PEFT's adapters, transformers' classes of the models that they were trained on.
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# What PEFT takes to find an adapter's weights.
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


def load_model(name: str | os.PathLike, *, headless: bool = False, **where: Any) -> Any:
    """A checkpoint's model in the class that its config names, out of transformers' own; one of PEFT's adapters on the
    checkpoint that they were trained on, and on the crossbars that were saved beside them. Unlike ``from_pretrained``
    it makes nothing up that the checkpoint lacks.

    Args:
        name: folder or Hub id, also of a timm model.
        headless: where the checkpoint lacks the weights of its class's head, load the model without one.
        where: as in ``from_pretrained``, a ``quantization_config`` too.

    Raises:
        ValueError: the config names no such class, or what stands there is no such checkpoint: weights or numbers of
            calibration are missing or have other shapes, which are named, or the config leaves layers digital whose
            numbers of calibration are there.
        OSError: nothing is there, or it cannot be reached. ImportError: a package is missing that the model needs.
    """
    with _explained(name), held_back():
        asked = {key: where.pop(key) for key in (ASKED,) if where.get(key) is not None}
        if has_file(name, ADAPTER, **where):
            return _load_adapted(name, where, asked)
        model, missing = _load_whole(name, where, asked, headless)
        refuse_random(name, model, missing)
        return model


@contextmanager
def _explained(name: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name} cannot be loaded: its config is nested too deeply") from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, *UNREADABLE) as error:
        # What a stranger's config makes transformers and peft stumble over.
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_adapted(name: str | os.PathLike, where: dict[str, Any], asked: dict[str, Any]) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapter = PeftConfig.from_pretrained(str(name), **where)
    base_name = adapter.base_model_name_or_path
    if not isinstance(base_name, str) or not base_name:
        raise ValueError(f"{name}: base_model_name_or_path={shown(base_name)}: allowed is a folder or Hub id")
    if has_file(base_name, ADAPTER):
        raise ValueError(f"{name}: base_model_name_or_path={base_name!r} has adapters itself: allowed is a whole model")
    told = {key: where[key] for key in HUB if key in where}
    stored = load_peft_weights(str(name), device="cpu", **told).keys()
    config = asked.get(ASKED)
    if isinstance(config, dict) and config.get("quant_method") == ReRAMConfig.quant_method:
        config = ReRAMConfig.from_dict(config)
    ours = isinstance(config, ReRAMConfig)  # for what the adapters were trained on, and not for the base alone
    with _explained(base_name):
        base, missing = _load_whole(base_name, {}, {} if ours else asked, wanted=_Wanted(adapter, stored))
    crossbars = stored_crossbars(name, **where)
    if crossbars is not None and crossbars.before_adapters:
        crossbars.put_on(base)
    model = PeftModel.from_pretrained(base, name, **where)
    brought, embeddings = (
        get_peft_model_state_dict(model, save_embedding_layers=all_).keys() for all_ in (False, True)
    )
    refuse_misplaced(name, base, weights_of(stored - brought - embeddings))
    refuse_random(name, model, weights_of(brought - stored))
    trained = tuple(f"{part}." for part, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    refuse_random(base_name, base, [key for key in missing if not key.startswith(trained)])
    if crossbars is not None:
        crossbars.put_on(model)
        crossbars.load_numbers(model)
    if isinstance(config, ReRAMConfig):
        put_on(model, config)
    if crossbar_layers(model) and (report := stored_report(name, **where)) is not None:
        attach_report(model, report, name)
    return model


def _load_whole(
    name: str | os.PathLike,
    where: dict[str, Any],
    asked: dict[str, Any],
    headless: bool = False,
    wanted: "_Wanted | None" = None,
) -> tuple[Any, list[str]]:
    """A model, of the class that adapters have ``wanted`` where there are some, and keys of the weights that its
    checkpoint lacks, which are random in it."""
    import transformers

    file: Any = cached_file(name, CONFIG, **where) if has_file(name, CONFIG, **where) else None
    data = {} if file is None else read_json(file)
    if isinstance(data, dict) and "model_type" not in data and "architecture" in data:  # as timm writes it
        _need_timm(name)
    if isinstance(data, dict) and not isinstance(data.get(ASKED), (dict, type(None))):
        raise ValueError(f"{name}: {ASKED}={shown(data[ASKED])}: allowed is an object")
    config = transformers.AutoConfig.from_pretrained(name, **where)
    given = config.architectures
    if given is None and isinstance(config, transformers.TimmWrapperConfig):  # timm names a model of its own there
        given = [transformers.TimmWrapperForImageClassification.__name__]
    for architecture in given if isinstance(given, (list, tuple)) else ():
        cls: Any = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
        if _is_model_of(cls, config):
            return _load_as(cls if wanted is None else wanted.of(cls, config), name, config, where, asked, headless)
    kind = type(config).__name__
    raise ValueError(f"{name}: architectures={shown(given)}: allowed is a list of transformers' classes for {kind}")


def _load_as(
    cls: Any, name: str | os.PathLike, config: Any, where: dict[str, Any], asked: dict[str, Any], headless: bool
) -> tuple[Any, list[str]]:
    given = {"ignore_mismatched_sizes": True, **where, **asked}  # transformers would not say which in its error
    model, info = cls.from_pretrained(name, config=config, output_loading_info=True, **given)
    if not where.get("ignore_mismatched_sizes"):
        refuse_misshaped(name, model, info["mismatched_keys"])
    missing, inside = missing_from(info, model), (f"{model.base_model_prefix}.",)
    if headless and missing and model.base_model is not model and not any(key.startswith(inside) for key in missing):
        return _load_as(type(model.base_model), name, config, where, asked, headless)
    refuse_digital(name, model, info["unexpected_keys"])
    if left := weights_of(info["unexpected_keys"]):
        logger.warning("%s holds weights that a %s has no place for: %s", name, cls.__name__, some(left))
    return model, missing


class _Wanted:
    """Of which class of transformers the model is that adapters were trained on, where that is not the one that its
    checkpoint's config names: a checkpoint without a head, or with one of another task, gets its head beside them.

    Args:
        adapter: their PeftConfig. keys: of their weights.
    """

    def __init__(self, adapter: Any, keys: Iterable[str]) -> None:
        self.task, self.mapped = adapter.task_type, (adapter.auto_mapping or {}).get("base_model_class")
        inside = "base_model.model."
        self.parts = {key.removeprefix(inside).partition(".")[0] for key in keys if key.startswith(inside)}

    def of(self, cls: type, config: Any) -> type:
        """The checkpoint's class, or where it has not all parts that the adapters have weights of, another that has."""
        import transformers

        auto: Any = getattr(transformers, TASKS.get(self.task or "", ""), None)
        found = () if auto is None else auto._model_mapping.get(type(config), ())
        others = [getattr(transformers, str(self.mapped), None), *(found if isinstance(found, tuple) else (found,))]
        others = [other for other in others if other is not cls and _is_model_of(other, config)]
        headless = (
            transformers.AutoModel._model_mapping.get(type(config), None) is cls and self.task != "FEATURE_EXTRACTION"
        )
        # A head of the task's name may be another task's too, and one that is not trained is none of the adapters'.
        first = cls not in (found if isinstance(found, tuple) else (found,)) and (self.task in HEADS or headless)
        tried = (*others, cls) if first else (cls, *others)
        return next((each for each in tried if others and self._fits(each, config)), cls)

    def _fits(self, cls: Any, config: Any) -> bool:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
        return self.parts <= {name for name, _ in model.named_children()}


def _need_timm(name: str | os.PathLike) -> None:
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name} is a model of timm, which is not installed: pip install 'hf_reram[vision]'"
        ) from error


def _is_model_of(cls: Any, config: Any) -> bool:
    """Whether it is a class of models that have such a config."""
    from transformers import PreTrainedModel

    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        return False
    return cls.config_class is not None and isinstance(config, cls.config_class)


def has_file(name: str | os.PathLike, file: str, **where: Any) -> bool:
    """Whether a checkpoint has a file.

    Args:
        name: folder or Hub id. where: as in ``from_pretrained``.
    """
    try:
        return cached_file(name, file, **where) is not None
    except OSError:  # no such file, or no way to it
        return False
