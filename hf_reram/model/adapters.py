"""Models that PEFT has wrapped, recognized without importing PEFT, which takes seconds."""

import sys
from typing import Any


def has_adapters(model: Any) -> bool:
    """Whether it is a ``PeftModel``."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def adapters_in_use(model: Any) -> list[str]:
    """What of a model's adapters is in use, in words: of each module that has some, unless it has a single one, which
    is in use. Prompts and prefixes are the whole model's."""
    if "peft" not in sys.modules:
        return []
    found = []
    if has_adapters(model):
        disabled = model._adapters_disabled
        if disabled or len(model.peft_config) > 1:
            found.append(f"active {model.active_adapters} disabled {disabled}")
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        there = module._get_available_adapters()
        active = [adapter for adapter in module.active_adapters if adapter in there]
        if module.disable_adapters or set(active) != there or len(there) > 1:
            found.append(f"{name} active {active} disabled {module.disable_adapters}")
    return found


def adapter_scales(model: Any) -> dict[str, Any]:
    """By what the modules inside a model multiply what their adapters in use add, by module and adapter."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        scales = getattr(module, "scaling", None) if isinstance(module, BaseTunerLayer) else None
        if isinstance(scales, dict):
            found[name] = {adapter: scales[adapter] for adapter in module.active_adapters if adapter in scales}
    return found


def adapter_keys(model: Any) -> set[str]:
    """Keys of a ``PeftModel``'s state dict that its adapters have brought, not the model inside."""
    if not has_adapters(model):
        return set()
    prefix = getattr(model.base_model, "prefix", None)  # of the adapters' parts, as "lora_"
    return {key for key in model.state_dict() if prefix and any(part.startswith(prefix) for part in key.split("."))}
