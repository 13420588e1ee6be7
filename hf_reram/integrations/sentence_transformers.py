"""What sentence-transformers does in another way than transformers.

A SentenceTransformer calls the ``forward`` of the model inside, past its hooks. The trainer's loss runs the model, once
for each column of a batch, and samplers say which examples make one. Recognized by methods, so that the package need
not be there.
"""

import inspect
import sys
from collections.abc import Iterable
from types import CodeType
from typing import Any

FORWARD = "forward"


class Forward:
    """What takes the place of ``forward`` on a patched PreTrainedModel: it calls the model, unless that is what calls
    it, so that hooks run; a class, so that the model can be pickled and copied."""

    def __init__(self, model: Any):
        self.model, self.called = model, False

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.model), FORWARD))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """Which ``torch.export`` asks for."""
        return getattr(type(self.model), FORWARD).__code__

    def __call__(self, *args, **kwargs) -> Any:
        if self.called:
            return getattr(type(self.model), FORWARD)(self.model, *args, **kwargs)
        return self.model(*args, **kwargs)

    def begin(self, *_: Any) -> None:
        self.called = True

    def end(self, *_: Any) -> None:
        self.called = False


def attach_hooks(model: Any) -> None:
    """Have a PreTrainedModel's hooks run where a SentenceTransformer calls its ``forward``, if there may be one."""
    if "sentence_transformers" not in sys.modules or FORWARD in model.__dict__:
        return
    forward = model.__dict__[FORWARD] = Forward(model)
    hooks = model.__dict__.setdefault("_crossbar_hooks", [])
    hooks.append(model.register_forward_pre_hook(forward.begin))
    hooks.append(model.register_forward_hook(forward.end, always_call=True))


def detach_hooks(model: Any) -> None:
    """Undo :func:`attach_hooks`."""
    if isinstance(model.__dict__.get(FORWARD), Forward):
        del model.__dict__[FORWARD]


def trains(trainer: Any) -> bool:
    """Whether the trainer is one of sentence-transformers'."""
    return hasattr(trainer, "collect_features")


def loader(trainer: Any, dataset: Any) -> Iterable:
    """Batches of a data set as the trainer makes them, the same in all processes."""
    dataset = trainer.preprocess_dataset(dataset, dataset_name="train")
    return trainer._build_dataloader(dataset, trainer.args.per_device_train_batch_size, dataset_kind="train")


def features(trainer: Any, batch: dict[str, Any]) -> list[Any]:
    """What the model's forwards are given of a batch."""
    return trainer.collect_features({key: value for key, value in batch.items() if key != "dataset_name"})[0]


def refuse_second_forwards(trainer: Any) -> None:
    """
    Raises:
        ValueError: a teacher, or the loss "consistency", which compare one forward's outputs with another's: here the
            loss runs the model and keeps its outputs.
    """
    if trainer.teacher_given or trainer.reram_config.retention_loss == "consistency":
        raise ValueError(
            f"teacher= and retention_loss='consistency' with {type(trainer).__name__}: allowed are "
            "sentence-transformers' own losses of distillation, such as MSELoss, and another retention_loss"
        )
