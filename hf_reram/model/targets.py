"""Which layers PEFT's adapters can stand beside."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..nn.experts import CrossbarExperts
from ..nn.parts import Holder
from .find import patched_layers, unwrapped, walk

# PEFT takes layers of these names in a mixture for its experts' and router's, which older checkpoints called so.
EXPERTS_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))


def adapter_target_modules(model: nn.Module) -> str | list[str]:
    """What adapters of a patched model can have as ``target_modules``, such as those of ``peft.LoraConfig``.

    That is "all-linear", but for two kinds of models that lists the linear layers which PEFT means by it without those
    that no adapter can stand beside: where experts that are stacked in one tensor are on crossbars, PEFT would add
    adapters of their weights by itself, which no cells compute (nor can layers elsewhere be named as experts' are, such
    as ``down_proj``), and adapters on the ``out_proj`` of ``nn.MultiheadAttention`` never run.

    Args:
        model: patched by :func:`hf_reram.patch_model`, before it gets adapters.

    Raises:
        ValueError: the model is not patched, or no layer is left.
    """
    patched_layers(model)
    holders = [module for _, module in walk(model) if isinstance(module, Holder)]
    if not holders:
        return "all-linear"
    base: Any = unwrapped(model)
    left = {module for holder in holders for module in holder.modules()}
    if hasattr(base, "get_output_embeddings"):
        left.add(base.get_output_embeddings())
    taken = EXPERTS_NAMES if any(isinstance(holder, CrossbarExperts) for holder in holders) else ()
    found = [
        name
        for name, module in walk(model)
        if isinstance(module, (nn.Linear, Conv1D)) and module not in left and name.rpartition(".")[2] not in taken
    ]
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no linear layers that adapters can stand beside: all are stacked experts or "
            "projections of nn.MultiheadAttention, or named as those of experts are"
        )
    return found
