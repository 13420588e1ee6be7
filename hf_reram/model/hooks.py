"""What other rooms do to a model when it goes on crossbars and comes off; they add theirs when imported."""

from collections.abc import Callable
from typing import Any

# Called with the model, without adapters around it, and its ReRAMConfig.
ON_PATCH: list[Callable[[Any, Any], None]] = []

# Called with each module of the model that is digital again.
ON_UNPATCH: list[Callable[[Any], None]] = []
