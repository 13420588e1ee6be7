"""Models that PEFT has wrapped, recognized without importing PEFT, which takes seconds."""

import sys
from typing import Any


def has_adapters(model: Any) -> bool:
    """Whether it is a ``PeftModel``."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
