"""What accelerate and DeepSpeed keep on modules and weights under private names, told to the rooms that need it."""

from functools import partial
from typing import Any

from ..model.hooks import CALLS_KEPT_FORWARD, IS_DISPATCHED, MASTERS


def register_wrappers() -> None:
    """Tell the model's room of both."""
    told: Any = ((IS_DISPATCHED, _has_hooks), (CALLS_KEPT_FORWARD, _calls_old_forward), (MASTERS, _master_of_zero))
    for hooks, own in told:
        if own not in hooks:
            hooks.append(own)


def _has_hooks(model: Any) -> bool:
    """Whether accelerate has put hooks on parts of a model, as it does to place or offload them."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def _calls_old_forward(module: Any, forward: Any) -> Any:
    """What the forward of accelerate's hook looks up in each call; None where ``forward`` is no such forward."""
    if not isinstance(forward, partial) or getattr(forward.func, "__module__", None) != "accelerate.hooks":
        return None
    return module.__dict__.get("_old_forward") if forward.args == (module,) else None


def _master_of_zero(weight: Any) -> Any:
    """This rank's part of a weight in float32, with which the next step of ZeRO 1 and 2 goes on, and where in the
    flattened weight it stands; None where DeepSpeed keeps none.

    Raises:
        NotImplementedError: ZeRO 3 has taken the weight apart.
    """
    if hasattr(weight, "ds_id"):
        raise NotImplementedError("DeepSpeed's zero_stage=3 is not supported: allowed are 0, 1 and 2; or use FSDP2")
    master = getattr(weight, "_hp_mapping", None)
    if master is None:
        return None
    address = master.lp_fragment_address
    return master.get_hp_fragment(), slice(address.start, address.start + address.numel)
