"""What other rooms do to a model when it goes on crossbars and comes off, and what they know of other packages' private
names; ``import hf_reram`` has them add theirs."""

from collections.abc import Callable
from typing import Any

# Called with the model, without adapters around it, and its ReRAMConfig.
ON_PATCH: list[Callable[[Any, Any], None]] = []

# Called with each module of the model that is digital again.
ON_UNPATCH: list[Callable[[Any], None]] = []

# Called with the state of a model whose training forward leaves out what its retention loss says.
ON_UNTENDED: list[Callable[[Any], None]] = []

# Called with a model: whether a package has placed its parts by hooks, and may have offloaded them.
IS_DISPATCHED: list[Callable[[Any], bool]] = []

# Called with a module and a forward on the instance: the method that this calls in turn, None where it is unknown.
CALLS_KEPT_FORWARD: list[Callable[[Any, Any], Any]] = []

# Called with a weight: a copy of a part of it that an optimizer goes on from, and the part's place in the flattened
# weight; None where there is none.
MASTERS: list[Callable[[Any], Any]] = []
