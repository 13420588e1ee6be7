"""Models are called and answer in many shapes; what they predict is in their logits."""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn import CrossbarLayer
from .find import crossbar_layers, unwrapped


def call_model(model: nn.Module, batch):
    """Call the model with a batch, moved to its device, without arguments that its forward does not take, such as the
    labels that a DataLoader gives beside the inputs: of a tuple, what the forward has no place for, and vectors at its
    end that the forward does not need; of one for a Hugging Face model, all labels behind its first value. A dict goes
    whole to a forward that takes one, as that of a SentenceTransformer.

    Raises:
        TypeError: a batch that is none, or that the model cannot be called with, or a tuple for a Hugging Face model
            whose later values may be labels or inputs.
    """
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise TypeError(
            f"a batch of type {type(batch).__name__}: allowed are a dict of the model's arguments, a tuple "
            "or list of them, and a tensor"
        )
    # Offloaded weights are on the meta device, where no batch can go.
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if _takes_dict(parameters, batch):
            return model(_moved(batch, device))
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        known = {k: v for k, v in batch.items() if k in parameters or (open_ended and isinstance(v, Tensor))}
        return model(**{**without_cache(model), **_moved(known, device)})
    if isinstance(batch, (tuple, list)):
        return model(*(_moved(value, device) for value in _inputs_of(model, batch)))
    return model(batch.to(device))


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument with which a language model keeps no cache, where its forward takes it: nobody reads that, and with
    one, transformers lets the sequences of a packed batch attend to one another."""
    return {"use_cache": False} if "use_cache" in inspect.signature(unwrapped(model).forward).parameters else {}


def _moved(value: Any, device: Any) -> Any:
    """On the device; a dict as a copy, to which a model may add."""
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _takes_dict(parameters: Mapping[str, inspect.Parameter], batch: Mapping) -> bool:
    """Whether a forward needs one argument, and a batch has none of what it could be given by name."""
    empty, kinds = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [name for name, p in parameters.items() if p.default is empty and p.kind not in kinds]
    return len(needed) == 1 and parameters.keys().isdisjoint(batch)


def _inputs_of(model: nn.Module, batch: Sequence) -> list:
    """A tuple's values that are the model's arguments."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return list(batch)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is inspect.Parameter.empty for p in positional)
    found = list(batch)[: len(positional)]
    if hasattr(unwrapped(model), "main_input_name"):  # a PreTrainedModel, where masks and labels look alike
        found = _without_labels(model, found, [p.name for p in positional], max(needed, 1))
    while len(found) > max(needed, 1) and isinstance(found[-1], Tensor) and found[-1].dim() < 2 <= found[0].dim():
        found.pop()
    if len(found) < needed:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in batch]
        raise TypeError(
            f"a batch of {shapes}: {type(model).__name__} needs {[p.name for p in positional[:needed]]}: allowed are a "
            "dict of the model's arguments, a tuple or list of them, and a tensor"
        )
    return found


def _without_labels(model: nn.Module, values: list, names: list[str], needed: int) -> list:
    """The values that a PreTrainedModel needs, if what follows them is labels for sure."""
    first = values[0] if values and isinstance(values[0], Tensor) else torch.empty(0)
    widths = (1, getattr(getattr(unwrapped(model), "config", None), "num_labels", 1))
    for place, (name, value) in enumerate(zip(names[needed:], values[needed:]), needed):
        scalars = not isinstance(value, Tensor) or value.dim() < 2
        classes = not scalars and value.dim() == 2 and value.shape[1] in widths and value.shape != first.shape[:2]
        if not (scalars or classes or "label" in name):
            raise TypeError(
                f"nothing tells whether value {place} of the tuple, of shape {tuple(value.shape)}, is labels or "
                f"{type(unwrapped(model)).__name__}'s {name!r}: allowed is a dict of the model's arguments, such as "
                f"{{{names[0]!r}: ..., 'labels': ...}}"
            )
    return values[:needed]


def decoder_inputs(model: nn.Module, batch: Mapping) -> dict[str, Tensor]:
    """The decoder's tokens that an encoder-decoder makes of its ``labels`` where a batch has none, by their name; empty
    for other models and batches."""
    base: Any = unwrapped(model)
    config: Any = getattr(base, "config", None)
    labels = batch.get("labels")
    given = any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or not isinstance(labels, Tensor) or not getattr(config, "is_encoder_decoder", False):
        return {}
    if callable(make := getattr(base, "prepare_decoder_input_ids_from_labels", None)):
        return {"decoder_input_ids": make(labels=labels)}
    start = getattr(config, "decoder_start_token_id", None)
    if start is None or "decoder_input_ids" not in inspect.signature(base.forward).parameters:
        return {}
    shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)
    return {"decoder_input_ids": shifted.masked_fill(shifted == -100, config.pad_token_id or 0)}


def begins_anew(stream: Iterable) -> bool:
    """Whether a data set can be read again from its beginning. Where it is its own iterator, two examples are read and
    compared."""
    if iter(stream) is not iter(stream):
        return True
    return _same(*(next(iter(stream), None) for _ in range(2)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b))


def uncompiled() -> AbstractContextManager:
    """Models and parts that torch.compile has compiled run as they are written, with their hooks; not where the caller
    is compiled itself."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():  # whose import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode for as long as the context lasts; every module's own mode is restored afterwards.
    What forwards inside see is no part of a training that numbers of calibration follow, whatever mode they run in."""
    modes = {module: module.training for module in model.modules()}
    states = {module.crossbar for module in modes if isinstance(module, CrossbarLayer)}
    followings = [(state, state.following) for state in states]
    for state in states:
        state.following = None
    model.eval()
    try:
        yield model
    finally:
        for state, following in followings:
            state.following = following
        for module, mode in modes.items():
            module.training = mode


def forked_rng(model: nn.Module) -> AbstractContextManager:
    """Random numbers drawn inside leave those after it as they would be, on the CPU and the model's devices alone."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind)


@dataclass(frozen=True)
class Prediction:
    """A logits tensor, and what it says of each of its places: an example, or a token, pixel or box of it.

    Attributes:
        logits: as the model gave them.
        kind: "classes": one of them (softmax); "labels": each for itself (sigmoid); "values": means of unit Gaussians.
        class_dim: the dimension of classes, labels or values.
        keep: (examples, places), 0 at padding and 1 elsewhere; None where all count.
    """

    logits: Tensor
    kind: str
    class_dim: int
    keep: Tensor | None

    def by_place(self, logits: Tensor) -> Tensor:
        """Logits of this prediction's shape in float32, (examples, places, classes)."""
        rows = logits.float().movedim(self.class_dim, -1) if logits.dim() > 1 else logits.float()[:, None]
        return rows.reshape(len(rows), -1, rows.shape[-1])


def find_predictions(outputs, model: nn.Module | None = None) -> list[Prediction]:
    """What a model predicts in its outputs, tensor by tensor of :func:`find_logits`. A single number is a value, and so
    are all of a regression; labels are those of a multi-label classification (``config.problem_type``), and of a mask
    that is predicted for each query; all else is classes, along the last dimension, or, of images, the second.

    Args:
        model: that gave the outputs, on crossbars, last: its config says what they mean, and its attention mask which
            tokens are padding. Without it nothing is known of either.
    """
    config = getattr(unwrapped(model), "config", None)
    return [_prediction(name, logits, model, config) for name, logits in find_logits(outputs).items()]


def _prediction(name: str, logits: Tensor, model: nn.Module | None, config: Any) -> Prediction:
    shape, labels, kind = logits.shape, getattr(config, "num_labels", None), "classes"
    image = len(shape) > 3
    class_dim = 1 if image and not (shape[-1] == labels != shape[1]) else -1
    if len(shape) < 2 or shape[class_dim] == 1 or name == STATES[0]:
        kind = "values"
    if len(shape) == 2 and shape[1] == labels:
        meant = {"multi_label_classification": "labels", "regression": "values"}
        kind = meant.get(getattr(config, "problem_type", None) or "", kind)
    elif image and name.startswith("masks"):
        kind = "labels"
    return Prediction(logits, kind, class_dim, _tokens_kept(logits, model))


def _tokens_kept(logits: Tensor, model: nn.Module | None) -> Tensor | None:
    """(examples, tokens), 0 where logits (examples, tokens, classes) are those of padding in the model's last forward;
    None where unknown."""
    for layer in crossbar_layers(model).values() if model is not None and logits.dim() == 3 else ():
        keep = layer.crossbar.forward.padding.keep(logits)
        if keep is not None:
            return keep.view(logits.shape[:2])
    return None


# What models without logits predict, the first of these that they give.
STATES = ("sentence_embedding", "last_hidden_state")


def find_logits(outputs) -> dict[str, Tensor]:
    """The logits in a model's outputs by name: every tensor under a key that ends in "logits", or, where there is none,
    the embedding of a sentence, the last hidden state, or the output itself if it is a tensor.

    Raises:
        ValueError: there is none of these.
    """
    if isinstance(outputs, Tensor):
        return {"": outputs}
    if isinstance(outputs, Mapping):
        found = {k: v for k, v in outputs.items() if k.endswith("logits") and isinstance(v, Tensor)}
        for name in STATES if not found else ():
            if not found and isinstance(outputs.get(name), Tensor):
                found = {"" if name == STATES[-1] else name: outputs[name]}
        if found:
            return found
        raise ValueError(f"the model's outputs {sorted(outputs)} hold no logits, {', '.join(STATES)}")
    tensors = (
        [v for v in outputs if isinstance(v, Tensor) and v.dim() > 1] if isinstance(outputs, (tuple, list)) else []
    )
    if not tensors:
        raise ValueError(f"the model's output of type {type(outputs).__name__} holds no logits")
    return {"": tensors[0]}
