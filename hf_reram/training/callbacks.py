"""What happens between the steps of a training."""

from typing import Any

from transformers import TrainerCallback

from ..model.deploy import warn_uncalled
from ..model.find import crossbar_layers, reset_calls, uncalled
from .losses import hold_weights


class HoldWeights(TrainerCallback):
    """After each optimizer step, back into the cells' range."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._sums.clear()
        self.trainer._logged_step = state.global_step
        hold_weights(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        hold_weights(self.trainer.model)


class NameUncalled(TrainerCallback):
    """After the training, a warning with the names of crossbar layers that took no part in it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.uncalled: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        self.uncalled = set(crossbar_layers(self.trainer.model))
        reset_calls(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.uncalled:  # after the first step, mostly none
            self.uncalled &= set(uncalled(self.trainer.model))

    def on_train_end(self, args, state, control, **kwargs):
        names = [name for name in crossbar_layers(self.trainer.model) if name in self.uncalled]
        warn_uncalled(self.trainer.model, "were not called in training", names)
