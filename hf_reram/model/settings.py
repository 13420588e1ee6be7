"""What the configs of transformers say that figures depend on."""

import re
from typing import Any

from .description import kinds_of

# Of a model's config: where it is from, how it is stored and called, and what a robust model's config says elsewhere.
COSMETIC = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "_from_model_config",
)
# What libraries' classes, and configs, have for trainings alone.
TRAINING_ONLY = re.compile(
    r"(.*_)?(?<!token_)(dropout|pdrop|layerdrop|drop_path|drop_prob)(_prob|_rate|_p)?"
    r"|(.*_)?initializer_(range|factor|std)|gradient_checkpointing"
)


def is_config(value: Any) -> bool:
    """Whether it is the config of a model, or of what it generates."""
    return not kinds_of(value).isdisjoint(("PreTrainedConfig", "PretrainedConfig", "GenerationConfig"))


def parts_of(config: Any) -> list[Any]:
    """A config and those inside it."""
    held = getattr(config, "__dict__", {}).values()
    return [config, *(inner for part in held if is_config(part) for inner in parts_of(part))]


def telling(config: Any) -> dict[str, Any]:
    """What a config says, those inside it too, without what changes no figure; of what is not said the default that a
    generation takes, which loading may write there."""
    found = _telling(config.to_dict())
    defaults: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    return {name: defaults.get(name) if value is None else value for name, value in found.items()}


def _telling(config: dict[str, Any]) -> dict[str, Any]:
    classes = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else None
    found = {}
    for key, value in config.items():
        if key in COSMETIC or TRAINING_ONLY.fullmatch(str(key)):
            continue
        # Heads write there what they find the labels to be; the same labels tell it again.
        if key == "problem_type" and (value is None or (value == "regression") == (classes == 1)):
            continue
        found[key] = _telling(value) if isinstance(value, dict) else value
    return found
