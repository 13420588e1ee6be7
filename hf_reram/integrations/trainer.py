"""Trainers whose models train on simulated ReRAM crossbars, and what they need of Trainer's private names."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..config import ReRAMConfig
from ..evaluation.trainer import EvaluationMixin
from ..hub.crossbars import CROSSBARS, StoredCrossbars
from ..hub.report import report_of
from ..hub.trainer import HubMixin
from ..model.deploy import digital
from ..model.find import crossbar_layers, crossbar_states
from ..model.sharding import is_sharded
from ..training.checkpoints import marked, staged, write_configs
from ..training.mixin import TrainingMixin
from . import sentence_transformers
from .trl import call_head, digital_references, prepared


class ReRAMTrainerMixin(TrainingMixin, EvaluationMixin, HubMixin):
    """Crossbars for ``Trainer`` or a subclass of it, such as ``Seq2SeqTrainer``::

        class MyTrainer(ReRAMTrainerMixin, Seq2SeqTrainer): ...

    It patches and calibrates the model, adds the retention loss, keeps weights within the cells' range, and evaluates
    as chips. The trainer takes its own arguments, and these by keyword.

    Args:
        reram_config: hardware and loss. None keeps the config of a model that is patched already; with another
            one it is put on those cells, the same layers unless it names others.
        teacher: a digital model with the same outputs; training then follows its predictions (KL divergence), so
            that labels are not needed.
        teacher_weight: share of the teacher's divergence in the task loss where the model also returns a loss.
        teacher_temperature: divides both models' logits in that divergence, above 0; more than 1 where training data
            show only some of the classes.
        eval_times: times since programming at which every evaluation also measures the model as chips, adding metrics
            such as ``eval_1d_loss`` and ``eval_1d_accuracy``, means over chips; ``metric_for_best_model`` may name one.
            A model that is digital then (:func:`hf_reram.digital`) is no chip, and has none of them.
        eval_chips: how many chips for ``eval_times``.
        calibration_dataset: what to calibrate on instead of ``train_dataset``.
        follow_training: let input ranges, offsets, gains, the ADCs' ranges and weight scales follow the activations and
            weights of the first nine tenths of the training (:func:`hf_reram.follow_training`).
        freeze_batch_norm: train with batch norm's running statistics and leave them as they are, for small batches and
            after :func:`hf_reram.calibration.batch_norm.fold_batch_norm`.

    Logs ``task_loss``, ``retention_loss`` and ``noise_to_signal`` (its mean over layers) beside ``loss``. Where the
    config adds no closed form to the loss, ``retention_loss`` is what "output" would be, measured for information.

    Raises:
        ValueError: the model is not patched and there is no config, a bad time or number of chips, a teacher's weight
            outside [0, 1], a temperature that is not above 0, or a teacher that shares modules or trained parameters
            with the model.
    """

    push_in_progress: Any

    def __init_subclass__(cls, **kwargs) -> None:
        """
        Raises:
            TypeError: a trainer stands before the mixin, whose methods would then not be called.
        """
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ReRAMTrainerMixin)]
        first = [base for base in before if issubclass(base, Trainer) and not issubclass(base, ReRAMTrainerMixin)]
        last = [base for base in cls.__bases__ if issubclass(base, ReRAMTrainerMixin)]
        if first:
            bases = [*last, *(base for base in cls.__bases__ if base not in last)]
            raise TypeError(
                f"class {cls.__name__}({_names(cls.__bases__)}): allowed is the mixin before the trainer: "
                f"class {cls.__name__}({_names(bases)})"
            )

    def _prepare_crossbars(self, model: Any) -> None:
        super()._prepare_crossbars(model)
        call_head(model)
        if sentence_transformers.trains(self):
            sentence_transformers.refuse_second_forwards(self)

    def digital_references(self) -> AbstractContextManager:
        """As :class:`TrainingMixin`'s, for trl's trainers."""
        return digital_references(self)

    def compute_ref_log_probs(self, *args, **kwargs) -> Any:
        """As trl's ``DPOTrainer.compute_ref_log_probs``, of the digital model."""
        with digital(self.model) if crossbar_layers(self.model) else nullcontext(), self.digital_references():
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]

    def calibration_data(self) -> Any:
        """As :class:`TrainingMixin`'s, without the columns that the model does not take."""
        dataset = super().calibration_data()
        if self.calibration_dataset is not None:  # the trainer's own is prepared
            dataset = prepared(self, dataset, "train")
        if sentence_transformers.trains(self):
            return dataset
        if hasattr(dataset, "column_names") and not isinstance(dataset, IterableDataset):
            return self._remove_unused_columns(dataset, description="calibration")
        return dataset

    def calibration_collator(self) -> Any:
        """As :class:`TrainingMixin`'s; of streamed data and other kinds, whose columns cannot be removed before,
        without what the model does not take."""
        dataset = super().calibration_data()
        if hasattr(dataset, "column_names") and not isinstance(dataset, IterableDataset):
            return self.data_collator
        return self._get_collator_with_removed_columns(self.data_collator, description="calibration")

    def calibration_loader(self, dataset: Any) -> Iterable:
        """As :class:`TrainingMixin`'s; sentence-transformers' own of theirs, whose samplers say which examples make a
        batch."""
        if sentence_transformers.trains(self):
            return sentence_transformers.loader(self, dataset)
        return super().calibration_loader(dataset)

    def forward_inputs(self, batch: Any) -> list[Any]:
        """As :class:`TrainingMixin`'s; of sentence-transformers' batches each column, such as anchors and positives."""
        return sentence_transformers.features(self, batch) if sentence_transformers.trains(self) else [batch]

    def evaluation_dataset(self, dataset: Any) -> Any:
        """As :class:`EvaluationMixin`'s; trl's trainers tokenize texts in their ``evaluate``."""
        return prepared(self, dataset, "eval")

    def prepare_generation(self) -> None:
        """Have a Seq2SeqTrainer generate as its ``evaluate`` does, with the arguments' lengths and beams."""
        if not isinstance(self, Seq2SeqTrainer):
            return
        given: dict[str, Any] = {
            "max_length": self.args.generation_max_length,
            "num_beams": self.args.generation_num_beams,
            "synced_gpus": is_sharded(self.model) or None,  # each token is a forward, which all processes take part in
        }
        self._gen_kwargs = {name: value for name, value in given.items() if value is not None}
        self.gather_function = self.accelerator.gather

    def is_cast(self) -> bool:
        """Whether evaluations cast automatically: as the first Trainer that a model was given to has it."""
        if getattr(self.model, "_is_accelerate_prepared", False):
            return hasattr(self.model, "_original_forward")
        return bool(self.accelerator.native_amp)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer's, but a training that was finished before it was resumed gets no step more, which would make
        other weights of those that were evaluated."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with marked(folder) if self.args.should_save else nullcontext():
            if self.args.should_save:
                write_configs([state.config for state in crossbar_states(self.model)], folder)
            super()._save_checkpoint(model, trial)

    def checkpoint_configs(self, folder: str | os.PathLike) -> list[ReRAMConfig]:
        """As :class:`TrainingMixin`'s, and of older checkpoints of adapters what is beside them."""
        found, file = super().checkpoint_configs(folder), Path(folder) / CROSSBARS
        return [StoredCrossbars(str(file)).config] if not found and file.exists() else found

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir or "."
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with staged(output_dir) as staging:
            super()._save(staging, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, without what has to be unpickled, and with a card that is the new weights'."""
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        report = report_of(self.model)  # in all processes, which may each hold a part of the weights
        if not self.is_world_process_zero():
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        folders = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: os.path.basename(checkpoint_folder),
        }
        message, path = f"Training in progress, {when}", folders.get(args.hub_strategy)
        job = self.push_checkpoint(checkpoint_folder, report, message, path)
        jobs: Any = [*self.push_in_progress.jobs, job] if under_way else [job]
        self.push_in_progress = PushInProgress(jobs)

    def save_without_push(self) -> None:
        """``save_model``, which would push by itself where ``args.push_to_hub`` says so."""
        self.save_model(_internal_call=True)

    def wait_for_push(self) -> None:
        """Until an upload in the background has ended."""
        self._finish_current_push()


def _names(classes: Iterable[type]) -> str:
    return ", ".join(cls.__name__ for cls in classes)


class ReRAMTrainer(ReRAMTrainerMixin, Trainer):
    """``Trainer`` plus crossbars, with the arguments of :class:`ReRAMTrainerMixin`. Takes plain ``TrainingArguments``;
    everything else works as in ``Trainer``."""
