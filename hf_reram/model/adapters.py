"""Models that PEFT has wrapped, recognized without importing PEFT, which takes seconds."""

import sys
from typing import Any

from torch import nn


def has_adapters(model: Any) -> bool:
    """Whether it is a ``PeftModel``."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def without_adapters(model: Any) -> Any:
    """The model that PEFT has wrapped, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if has_adapters(model) else model


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that hold adapters beside a ``base_layer``, by qualified name."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
