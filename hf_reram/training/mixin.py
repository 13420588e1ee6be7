"""The part of a Trainer that trains a model on simulated ReRAM crossbars."""

import copy
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import IntervalStrategy, has_length
from transformers.utils import logging

from ..calibration.sensitivity import measure_sensitivity
from ..calibration.settle import calibrate
from ..config import ReRAMConfig
from ..device.checks import read_json
from ..device.seeds import derived_seed
from ..model.deploy import digital, refuse_modes, warn_uncalibrated
from ..model.find import crossbar_layers, crossbar_state, crossbar_states
from ..model.inputs import begins_anew, call_model, forked_rng
from ..model.patch import patch_model
from ..model.reconfigure import watch
from ..model.remap import put_on
from ..model.select import lies_as
from ..nn.clipping import clipped_beyond_choice, far_below_scale, warn_clipped
from ..nn.state import CrossbarState
from .callbacks import HoldWeights, NameUncalled
from .checkpoints import last_checkpoint, read_configs, set_incomplete_aside
from .diagnosis import explain
from .distillation import divergence
from .following import clamped_shares
from .losses import join_terms, measured_ratios, sampled_drift
from .task_loss import TaskLossMixin

logger = logging.get_logger(__name__)

# What the log has beside the loss: sums over steps and processes, and what they are divided by.
LOGGED = ("task_loss", "retention_loss", "noise_to_signal")

STEP = "training_step"

# Share of a layer's inputs beyond its range from which on there is a warning.
MUCH_CLAMPED = 0.05


class TrainingMixin(TaskLossMixin):
    """What :class:`hf_reram.ReRAMTrainerMixin` does to train: patches and calibrates the model, adds the losses, logs
    them, and keeps weights within the cells' range."""

    model: Any

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(base for base in cls.__mro__ if STEP in vars(base))
        if owner is cls or not issubclass(owner, TrainingMixin):  # else it is done
            setattr(cls, STEP, _looked_at(vars(owner)[STEP]))

    def __init__(
        self,
        *args,
        reram_config: ReRAMConfig | None = None,
        calibration_dataset=None,
        follow_training: bool = True,
        **kwargs,
    ):
        self.reram_config: Any = reram_config
        self._given_config, self._handed_config = copy.deepcopy(reram_config), reram_config
        self.calibration_dataset, self.follow_training = calibration_dataset, follow_training
        self._sums: dict[str, Tensor] = {}
        self._told_of_clamped = self._joined = self._tended = False
        self._digitally: ExitStack | None = None  # within train_digitally, what has models be digital
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} in one process on {self.args.n_gpu} GPUs would train copies of the model with "
                "nn.DataParallel, where drift and retention terms are lost: start a process for each GPU, as "
                "accelerate launch does, or set CUDA_VISIBLE_DEVICES to one"
            )
        self._prepare_crossbars(self.model)
        self.add_callback(HoldWeights(self))
        self.add_callback(NameUncalled(self))

    # Set-up

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if hasattr(self, "data_collator"):  # a later call, from train(): the first is prepared by __init__
            self._prepare_crossbars(model.to(self.args.device))
            if self._digitally is not None:
                self._digitally.enter_context(digital(model))
        return model

    def _prepare_crossbars(self, model: nn.Module) -> None:
        patched, wanted = bool(crossbar_layers(model)), self._given_config  # not an earlier trial's
        if wanted is None and not patched:
            raise ValueError(f"the model is not patched: {type(self).__name__} needs reram_config=ReRAMConfig(...)")
        if wanted is not None and not patched:
            patch_model(model, wanted)
        elif wanted is not None:
            move = put_on(model, wanted)
            if "device" in move.differs:
                logger.warning("the model was on %s: put on %s, as reram_config says", move.devices, wanted.device.name)
            if layers := move.layers("before"):
                logger.warning("reram_config names other layers than the model had on crossbars: %s", layers)
        state = crossbar_state(model)
        self.reram_config = state.config
        if self._handed_config is not None:
            watch(self._handed_config, model)
        self._settle_crossbars(model, any(part.term == "sensitivity" for part in crossbar_states(model)))

    def calibrate_rewritten(self) -> None:
        """Calibrate anew where something has written other weights since the model was prepared, as
        ``load_state_dict`` may: they would be cut to what the cells hold."""
        self._settle_crossbars(self.model, False)

    def _settle_crossbars(self, model: nn.Module, needs_sensitivity: bool) -> None:
        """Calibrate where there is need to, and name layers where there are no data to do it with."""
        layers = crossbar_layers(model).values()
        warn_clipped(layers)
        fits = not clipped_beyond_choice(layers) and not far_below_scale(layers)
        calibrated = fits and all(layer.calibrated for layer in layers)
        if calibrated and not needs_sensitivity:
            return
        batches = self._calibration_batches()
        if batches is None:
            warn_uncalibrated(model)
            return
        with forked_rng(model):  # so that training does not depend on whether calibration was needed
            if calibrated:
                measure_sensitivity(model, list(batches))
            else:
                calibrate(model, batches)

    def calibration_data(self) -> Any:
        """The data set that the model is calibrated on, or None."""
        return self.calibration_dataset if self.calibration_dataset is not None else self.train_dataset

    def calibration_collator(self) -> Any:
        """What makes batches of the data set that the model is calibrated on."""
        return self.data_collator

    def calibration_loader(self, dataset: Any) -> Iterable:
        """Its batches, the same in all processes."""
        shuffle = has_length(dataset) and not isinstance(dataset, IterableDataset)
        return DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.args.seed) if shuffle else None,
            collate_fn=self.calibration_collator(),
        )

    def forward_inputs(self, batch: Any) -> list[Any]:
        """What the model's forwards are given of a batch, each by itself."""
        return [batch]

    def _calibration_batches(self) -> Iterable | None:
        dataset = self.calibration_data()
        if dataset is None:
            return None
        if self.calibration_dataset is None and isinstance(dataset, Iterable) and not begins_anew(dataset):
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__} that can be read once, so that what calibration reads "
                "would be lost to the training: give calibration_dataset=, or one whose __iter__ begins anew"
            )
        # Not get_train_dataloader: every process must see the same batches, and training none of them consumed.
        batches = zip(self.calibration_loader(dataset), range(self.reram_config.calibration_batches))
        return (inputs for batch, _ in batches for inputs in self.forward_inputs(batch))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [n for n in super().get_decay_parameter_names(model) if not n.endswith("input_range")]

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As ``Trainer.train``. Where it resumes, checkpoints whose saving was interrupted are set aside, so that
        ``True`` resumes from the last whole one; :func:`hf_reram.training.checkpoints.last_checkpoint` finds it.

        Raises:
            FloatingPointError: the loss is NaN or infinite; says which layer made it so.
            ValueError: the checkpoint was calibrated for other hardware than the model's config says.
            ValueError: the model is deployed as a chip, or digital.
        """
        refuse_modes(self.model, "train it")
        return self._train_from(resume_from_checkpoint, *args, **kwargs)

    def train_digitally(self, resume_from_checkpoint: str | bool | None = None) -> Any:
        """Train with all crossbars digital: the same data, steps and task loss, without drift, retention loss and the
        cells' range. What finetuning does by itself; the trainer is then done. Evaluations in between measure no chips,
        whatever ``eval_times`` says.

        Raises:
            ValueError: the config has a retention loss, which a digital model has none of.
        """
        if (loss := self.reram_config.retention_loss) != "none":
            raise ValueError(f"retention_loss={loss!r} in a digital training: allowed is 'none'")
        self.remove_callback(HoldWeights)
        self.remove_callback(NameUncalled)
        with ExitStack() as stack:
            stack.callback(setattr, self, "_digitally", None)
            stack.enter_context(digital(self.model))
            self._digitally = stack
            return self._train_from(resume_from_checkpoint)

    def _train_from(self, resume_from_checkpoint: str | bool | None, *args, **kwargs) -> Any:
        if resume_from_checkpoint:
            if self.is_world_process_zero():
                set_incomplete_aside(self.args.output_dir or ".")
            self.accelerator.wait_for_everyone()
            self._refuse_other_hardware(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def checkpoint_configs(self, folder: str | os.PathLike) -> list[ReRAMConfig]:
        """Configs that a checkpoint was trained with, of each part of the model that was patched by itself; none where
        nothing tells.

        Raises:
            ValueError: a file of it holds something else.
        """
        if (configs := read_configs(folder)) is not None:
            return configs
        file = Path(folder) / "config.json"
        data = read_json(file) if file.exists() else {}
        stored = data.get("quantization_config") if isinstance(data, dict) else None
        if not isinstance(stored, dict) or stored.get("quant_method") != ReRAMConfig.quant_method:
            return []
        return [ReRAMConfig.from_dict(stored)]

    def _refuse_other_hardware(self, checkpoint: str | bool) -> None:
        folder = last_checkpoint(self.args.output_dir or ".") if checkpoint is True else checkpoint
        before = self.checkpoint_configs(str(folder)) if folder else []
        if len(before) == 1 and lies_as(self.model, before[0], stored=True):
            return
        now = [state.config.hardware() for state in crossbar_states(self.model)]
        pairs = [(config.hardware(), own) for config, own in zip(before, now)]
        other = sorted({name for one, two in pairs for name in two if one[name] != two[name]})
        if other:
            raise ValueError(
                f"{folder} was calibrated with another {', '.join(other)}: resume with the same ReRAMConfig, or start "
                "from its weights with hf_reram.patch_model and calibrate"
            )

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        kept = dict(inputs)
        self._begin_step(tended=True)
        with self._sampled_drift():  # around the backward too, in which GradCache runs the model
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_lost("compute_loss")
        self._refuse_infinite(loss, kept)
        return loss

    def _begin_step(self, tended: bool) -> None:
        self._tended, self._joined, self._guided = tended, False, False
        for state in crossbar_states(self.model):
            state.begin_step()

    def _refuse_unguided(self, method: str) -> None:
        """As :class:`TaskLossMixin`'s, where the step has run the model."""
        if any(state.began for state in crossbar_states(self.model)):
            super()._refuse_unguided(method)

    def _refuse_lost(self, method: str) -> None:
        """
        Raises:
            RuntimeError: a step with a method of one's own has run the model, and no drift was sampled, or the
                retention loss joined none.
        """
        own, wanted = f"{type(self).__name__}.{method}", f"retention_loss={self.reram_config.retention_loss!r}"
        if self._joined:
            return
        if self._left_terms():
            raise RuntimeError(
                f"{own} calls neither super().{method} nor hf_reram.add_retention_loss, so that {wanted} joins no "
                "loss: call one of them"
            )
        trained = [state for state in crossbar_states(self.model) if state.trained and not self._tended]
        if any(state.physics.drift is not None and not state.sampled for state in trained):
            raise RuntimeError(
                f"{own} calls neither super().{method} nor hf_reram.sampled_drift, so that {wanted} samples no drift: "
                "call one of them"
            )

    def _refuse_infinite(self, loss: Tensor, inputs: Any) -> None:
        """
        Raises:
            FloatingPointError: the loss of a step is NaN or infinite, in this process or in another.
        """
        finite = torch.isfinite(loss)
        several = self.args.world_size > 1
        if several and not bool(self.accelerator.gather(finite.reshape(1)).all()) and finite:
            raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is not finite in another process")
        if not finite:  # Trainer reads the loss here too, to keep it out of its log
            why = "" if several else ": " + self._why(inputs)  # to run the model again, all would have to
            raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is {float(loss)}{why}")

    def digital_references(self) -> AbstractContextManager:
        """Around the loss: what a trainer compares the model with computes digitally."""
        return nullcontext()

    def _left_terms(self) -> bool:
        """Whether the step's forwards hold a retention loss that was not taken."""
        states = [state for state in crossbar_states(self.model) if state.trained]
        closed = [state for state in states if state.term is not None]
        # The last one may be one without gradients, or in evaluation.
        left = any(not state.settled or (state.forward.grad and state.forward.terms) for state in closed)
        return left or any(state.config.retention_loss == "consistency" for state in states)

    def _sampled_drift(self, kind: str | None = None) -> AbstractContextManager:
        """That of this step, the same in all its micro-batches and processes, as strong as the warm-up lets it be."""
        seed, done = derived_seed(self.args.seed, f"step {self.state.global_step}"), self.state.global_step + 1
        warmup = crossbar_state(self.model).config.retention_warmup * self.state.max_steps
        return sampled_drift(self.model, kind, seed, min(done / warmup, 1.0) if warmup > 0 else 1.0)

    def _why(self, inputs: Any) -> str:
        with self.compute_loss_context_manager(), sampled_drift(self.model):
            return explain(self.model, lambda: call_model(self.model, inputs))

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The task loss, and in training the teacher's divergence and the retention loss, as the config says."""
        if not model.training:
            with self.digital_references():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        state = crossbar_state(self.model)
        self._joined = True
        for part in crossbar_states(self.model):
            part.measure = part.term != "output" and self._measures_next(part)
        consistency = state.config.retention_loss == "consistency"
        kept, wants_outputs = dict(inputs), return_outputs or consistency
        with self._sampled_drift(), self.digital_references():
            found = super().compute_loss(model, inputs, wants_outputs, num_items_in_batch)
        task_loss, outputs = found if wants_outputs else (found, None)
        scaled = self.is_scaled(num_items_in_batch)
        steps = getattr(self, "current_gradient_accumulation_steps", 1)
        # Per micro-batch; the Trainer divides the whole loss by the steps unless it is scaled already.
        share = 1 / steps if scaled else 1.0
        loss, retention = task_loss, None
        if any(part.term is not None for part in crossbar_states(self.model)):
            loss, retention = join_terms(task_loss, self.model, share=share)
        elif consistency:
            state.measure, state.ratios = False, state.forward.ratios
            with self._sampled_drift("drift"):
                retention = divergence(model(**self.without_labels(kept)), outputs, model=model)
            weight = state.config.retention_weight * share
            loss, retention = task_loss + weight * retention, retention.detach()
        ratios = measured_ratios(self.model)
        self._count("task_loss", task_loss.detach() / (1 if scaled else steps), 1 / steps)
        if retention is not None:
            self._count("retention_loss", retention / steps, 1 / steps)
        if ratios:
            mean = torch.stack(list(ratios.values())).mean()
            self._count("noise_to_signal", mean)
            if retention is None:
                self._count("retention_loss", mean)
        return (loss, outputs) if return_outputs else loss

    # Logging

    def _measures_next(self, part: CrossbarState) -> bool:
        """Whether the step under way measures noise-to-signal ratios although its loss does not need them: one in as
        many as are logged together; under ``torch.compile``, whose code does not measure, all that run without it."""
        if self.args.logging_strategy == IntervalStrategy.NO:
            return False
        if part.compiled:
            return part.looks_uncompiled
        every = max(int(self.state.logging_steps or 0), 1)
        every = every if self.args.logging_strategy == IntervalStrategy.STEPS else min(every, 10)
        return (self.state.global_step + 1) % every == 0 or self.state.global_step == 0

    def _count(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        value = value.to(self.args.device, torch.float32)
        pair = torch.stack((value, torch.full_like(value, weight)))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            nothing = torch.zeros(
                2, dtype=torch.float32, device=self.args.device
            )  # of a process that has called no crossbar
            sums = torch.stack([self._sums.get(name, nothing) for name in LOGGED])
            for name, (total, weight) in zip(LOGGED, self.accelerator.reduce(sums).tolist()):
                if weight:
                    logs[name] = total / weight
            self._sums.clear()
            self._log_clamped(logs)
        super().log(logs, *args, **kwargs)

    def _log_clamped(self, logs: dict[str, float]) -> None:
        shares = {name: float(share) for name, share in clamped_shares(self.model).items()}
        shares = {name: share for name, share in shares.items() if math.isfinite(share)}
        if not shares:
            return
        logs["clamped"] = sum(shares.values()) / len(shares)
        lasting = clamped_shares(self.model, twice=True)
        high = [f"{name} ({share:.0%})" for name, share in shares.items() if float(lasting[name]) > MUCH_CLAMPED]
        if high and self.state.global_step > 0 and not self._told_of_clamped:
            self._told_of_clamped = True
            advice = "Let numbers follow the training (follow_training=True), or calibrate the model anew"
            if self.follow_training:
                advice = "Ranges follow the training; where the share ('clamped' in the log) stays high, calibrate anew"
            if self.is_world_process_zero():
                logger.warning(
                    "step %d: much of the inputs of %d crossbar layers lies beyond their input range, is clamped and "
                    "gets no gradient: %s. %s",
                    self.state.global_step,
                    len(high),
                    ", ".join(high),
                    advice,
                )


def _looked_at(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A ``training_step`` of a subclass, held to what ours does where it does not call that."""

    @functools.wraps(step)
    def training_step(self, model, inputs, *args, **kwargs) -> Tensor:
        kept = dict(inputs) if isinstance(inputs, Mapping) else inputs
        self._begin_step(tended=False)
        loss = step(self, model, inputs, *args, **kwargs)
        if not self._tended:
            self._refuse_unguided(STEP)
            self._refuse_lost(STEP)
            self._refuse_infinite(loss, kept)
        return loss

    return training_step
