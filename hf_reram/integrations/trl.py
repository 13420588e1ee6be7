"""What trl's trainers compute past the model: a language model's head by its weight, and a reference to compare with.

Recognized by what they put on a model and a trainer, so that trl need not be installed.
"""

import inspect
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..model.adapters import has_adapters
from ..model.deploy import digital
from ..model.find import crossbar_layers, crossbar_states, unwrapped
from ..nn import CrossbarLayer

REFERENCE = "ref"  # trl's name for the copy of an adapter that is trained further


def call_head(model: Any) -> None:
    """Have trl's fused head of a model (``trl.trainer.utils.add_fused_lm_head``), which multiplies by the head's weight
    itself, call the head where that is on a crossbar. The logits of all tokens are then in memory, as without trl."""
    base = unwrapped(model)
    fused: Any = base.__dict__.get("forward")
    code = getattr(getattr(fused, "__func__", None), "__code__", None)
    if code is None or "fused_lm_head" not in code.co_varnames:
        return
    from trl.trainer.utils import FusedCausalLMOutput

    told = inspect.getclosurevars(fused).nonlocals
    temperature, fields = told["temperature"], set(told["outputs"]) | {"log_probs"}

    def forward(
        self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs
    ) -> Any:
        head = self.get_output_embeddings()
        if not fused_lm_head or not any(isinstance(m, CrossbarLayer) for m in head.modules()):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return fused(*args, **kwargs, **given, **({"fused_lm_head": True} if fused_lm_head else {}))
        outputs = fused(*args, **{**kwargs, "use_cache": False})
        logits, targets = (outputs.logits, shift_labels) if labels is None else (outputs.logits[:, :-1], labels[:, 1:])
        by_token = by_tokens(logits / temperature, targets.to(logits.device))
        mask = by_token["label_mask"]
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -by_token["log_probs"].sum() / count, getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        wanted = {name: value for name, value in by_token.items() if name in fields}
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **wanted)

    forward.__signature__ = inspect.signature(fused.__func__)  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def by_tokens(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What ``FusedCausalLMOutput`` has of each token, by its names, 0 where there is no label.

    Args:
        logits: (batch, tokens, vocabulary), divided by the temperature. labels: (batch, tokens), -100 for none.
    """
    mask = labels != -100
    logs = logits.float().log_softmax(-1)
    found = {
        "log_probs": logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logs.exp() * logs).sum(-1),
    }
    with torch.no_grad():
        found["log_sum_sq_probs"] = (2 * logs).logsumexp(-1)
        found["mean_logits"] = logits.float().mean(-1)
        found["is_top1"] = logs.argmax(-1) == labels
    return {name: value.masked_fill(~mask, 0) for name, value in found.items()} | {"label_mask": mask}


def prepared(trainer: Any, dataset: Any, name: str) -> Any:
    """A data set of texts tokenized as trl's trainers do it with those that they are made with; what is tokenized
    stays, as data sets of others do.

    Args:
        name: "train" or "eval".
    """
    prepare, args = getattr(trainer, "_prepare_dataset", None), trainer.args
    skips = getattr(trainer, "_skip_prepare_dataset", False) or getattr(trainer, "_is_vision_dataset", False)
    if prepare is None or dataset is None or skips:
        return dataset
    packing, of_eval = getattr(args, "packing", False), getattr(args, "eval_packing", None)
    known = {
        "dataset": dataset,
        "processing_class": trainer.processing_class,
        "args": args,
        "packing": packing if name == "train" or of_eval is None else of_eval,
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": name,
    }
    return prepare(**{key: value for key, value in known.items() if key in inspect.signature(prepare).parameters})


@contextmanager
def digital_references(trainer: Any) -> Iterator[None]:
    """While a trainer computes its loss: the reference of DPO and the like is the digital model, what it is compared
    with the model on crossbars. Beside adapters the reference is the model itself without them, or with the adapter
    as it was before the training."""
    reference, model = getattr(trainer, "ref_model", None), trainer.model
    with ExitStack() as stack:
        if reference is not None and crossbar_layers(reference):
            stack.enter_context(digital(reference))
        if hasattr(trainer, "ref_model") and has_adapters(model) and crossbar_layers(model):
            hooks = _Digitally(model)
            stack.callback(model.register_forward_pre_hook(hooks.begin, prepend=True).remove)
            stack.callback(model.register_forward_hook(hooks.end, always_call=True).remove)
        yield


class _Digitally:
    """Hooks that have a model's forwards as a reference, and no others, be digital; what its last forward on crossbars
    was is not forgotten for them."""

    def __init__(self, model: Any):
        self.model, self.stack = model, ExitStack()

    def begin(self, module: Any, args: tuple) -> None:
        if self.model._adapters_disabled or REFERENCE in self.model.active_adapters:
            for state in crossbar_states(self.model):
                self.stack.callback(setattr, state, "forward", state.forward)
            self.stack.enter_context(digital(self.model))

    def end(self, *_: Any) -> None:
        self.stack.close()
