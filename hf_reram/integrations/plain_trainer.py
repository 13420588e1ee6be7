"""A warning where a Trainer without the mixin trains a model on crossbars, of which it knows nothing."""

import sys
from typing import Any

from ..lazy import load
from ..model.hooks import ON_UNTENDED

PLAIN = "trained by a plain Trainer"  # of a state's warnings


def register_plain_trainer() -> None:
    """Have states ask who trains them where a training forward has no drift, or its retention terms join no loss."""
    if warn_of_plain_trainer not in ON_UNTENDED:
        ON_UNTENDED.append(warn_of_plain_trainer)


def warn_of_plain_trainer(state: Any) -> None:
    """Warn once, if it is a Trainer."""
    if PLAIN in state.warned or (trainer := _trainer()) is None:
        return
    mixin = sys.modules.get("hf_reram.training.mixin")
    if mixin is not None and isinstance(trainer, mixin.TrainingMixin):
        return
    state.warned.add(PLAIN)
    name = type(trainer).__name__
    load("transformers.utils.logging", "get_logger")(__name__).warning(
        "%s trains a model on crossbars without retention_loss=%r: it samples no drift, adds no retention loss, and "
        "neither keeps weights in their cells nor lets ranges follow. Train with hf_reram.ReRAMTrainer, with "
        "class MyTrainer(ReRAMTrainerMixin, %s), or call hf_reram.sampled_drift and add_retention_loss in compute_loss",
        name,
        state.config.retention_loss,
        name,
    )


def _trainer() -> Any:
    """The Trainer whose training calls the model now, by whichever training step; None where none does."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    codes = (module.Trainer.training_step.__code__, module.Trainer.train.__code__)
    frame = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"]
