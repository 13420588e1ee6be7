"""What happens between the steps of a training."""

from typing import Any

from transformers import TrainerCallback

from ..model.deploy import warn_uncalled
from ..model.find import crossbar_layers, crossbar_states, is_compiled, reset_calls, uncalled
from .following import begin_following, follow_training, stop_following
from .losses import hold_weights

# Share of the training after which the numbers of calibration stay.
SETTLED = 0.9


class HoldWeights(TrainerCallback):
    """After each optimizer step, the numbers of calibration follow, and weights go back into the cells' range."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._sums.clear()
        self.trainer.calibrate_rewritten()  # before weights are cut off
        hold_weights(self.trainer.model)
        begin_following(self.trainer.model, state.global_step, self._settled(state))
        for part in crossbar_states(self.trainer.model):
            part.compiled = is_compiled(self.trainer.model_wrapped)

    def on_optimizer_step(self, args, state, control, **kwargs):
        follow_training(self.trainer.model)
        hold_weights(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        for part in crossbar_states(self.trainer.model):
            if part.following is not None:
                part.following.settled = self._settled(state)

    def on_save(self, args, state, control, **kwargs):
        """As a training that is resumed there does."""
        begin_following(self.trainer.model, state.global_step, self._settled(state))

    def on_train_end(self, args, state, control, **kwargs):
        stop_following(self.trainer.model)

    def _settled(self, state) -> bool:
        return not self.trainer.follow_training or state.global_step >= SETTLED * state.max_steps


class NameUncalled(TrainerCallback):
    """After the training, a warning with the names of crossbar layers that took no part in it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.uncalled: set[str] = set()
        self.first = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.uncalled, self.first = set(crossbar_layers(self.trainer.model)), state.global_step
        reset_calls(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.uncalled:  # after the first step, mostly none
            self.uncalled &= set(uncalled(self.trainer.model))

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:  # nothing was left to be trained
            return
        names = [name for name in crossbar_layers(self.trainer.model) if name in self.uncalled]
        warn_uncalled(self.trainer.model, "were not called in training", names)
