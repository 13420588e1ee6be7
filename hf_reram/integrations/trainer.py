"""Trainers whose models train on simulated ReRAM crossbars, and what they need of Trainer's private names."""

from typing import Any

from transformers import Trainer

from ..evaluation.trainer import EvaluationMixin
from ..hub.trainer import HubMixin
from ..training.checkpoints import staged
from ..training.mixin import TrainingMixin


class ReRAMTrainerMixin(TrainingMixin, EvaluationMixin, HubMixin):
    """Crossbars for ``Trainer`` or a subclass of it, such as ``Seq2SeqTrainer``::

        class MyTrainer(ReRAMTrainerMixin, Seq2SeqTrainer): ...

    It patches and calibrates the model, adds the retention loss, keeps weights within the cells' range, and evaluates
    as chips. The trainer takes its own arguments, and these by keyword.

    Args:
        reram_config: hardware and loss. None keeps the config of a model that is patched already.
        teacher: a digital model with the same outputs; training then follows its predictions (KL divergence), so
            that labels are not needed.
        teacher_weight: share of the teacher's divergence in the task loss where the model also returns a loss.
        teacher_temperature: divides both models' logits in that divergence, above 0; more than 1 where training data
            show only some of the classes.
        eval_times: times since programming at which every evaluation also measures the model as chips, adding metrics
            such as ``eval_1d_loss`` and ``eval_1d_accuracy``, means over chips; ``metric_for_best_model`` may name one.
        eval_chips: how many chips for ``eval_times``.
        calibration_dataset: what to calibrate on instead of ``train_dataset``.
        freeze_batch_norm: train with batch norm's running statistics and leave them as they are, for small batches and
            after :func:`hf_reram.calibration.batch_norm.fold_batch_norm`.

    Logs ``task_loss``, ``retention_loss`` and ``noise_to_signal`` (its mean over layers) beside ``loss``. Where the
    config adds no closed form to the loss, ``retention_loss`` is what "output" would be, measured for information.

    Raises:
        ValueError: the model is not patched and there is no config, a bad time or number of chips, a teacher's weight
            outside [0, 1], or a temperature that is not above 0.
    """

    def calibration_data(self) -> Any:
        """As :class:`TrainingMixin`'s, without the columns that the model does not take."""
        dataset = super().calibration_data()
        if hasattr(dataset, "column_names"):
            return self._remove_unused_columns(dataset, description="calibration")
        return dataset

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer's, but a training that was finished before it was resumed gets no step more, which would make
        other weights of those that were evaluated."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir or "."
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        quantizer = getattr(self.accelerator.unwrap_model(self.model), "hf_quantizer", None)
        try:
            if quantizer is not None:
                quantizer.gathered = state_dict
            with staged(output_dir) as staging:
                super()._save(staging, state_dict)
        finally:
            if quantizer is not None:
                quantizer.gathered = None

    def save_without_push(self) -> None:
        """``save_model``, which would push by itself where ``args.push_to_hub`` says so."""
        self.save_model(_internal_call=True)

    def wait_for_push(self) -> None:
        """Until an upload in the background has ended."""
        self._finish_current_push()


class ReRAMTrainer(ReRAMTrainerMixin, Trainer):
    """``Trainer`` plus crossbars, with the arguments of :class:`ReRAMTrainerMixin`. Takes plain ``TrainingArguments``;
    everything else works as in ``Trainer``."""
