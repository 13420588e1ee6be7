"""What happens between the steps of a training."""

from typing import Any

from transformers import TrainerCallback

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
