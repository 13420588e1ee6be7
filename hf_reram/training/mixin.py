"""A transformers.Trainer whose model trains on simulated ReRAM crossbars."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length

from ..calibration.batch_norm import freeze_batch_norm
from ..calibration.ranges import calibrate
from ..calibration.sensitivity import measure_sensitivity
from ..config import ReRAMConfig
from ..device.time import format_time, parse_time
from ..evaluation.report import RobustnessReport
from ..evaluation.robustness import DEFAULT_TIMES, evaluate_robustness
from ..hub.about import about_model
from ..hub.publish import publish
from ..hub.push import push
from ..hub.report import report_of, unmeasured
from ..model.deploy import deploy
from ..model.find import crossbar_layers, crossbar_state
from ..model.patch import patch_model, unpatch_model
from ..nn.state import layer_seed
from .checkpoints import set_incomplete_aside, staged
from .diagnosis import explain
from .distillation import divergence
from .losses import add_retention_loss, hold_weights, noise_to_signal, sampled_drift


class ReRAMTrainer(Trainer):
    """``Trainer`` plus crossbars: patches and calibrates the model, adds the retention loss, keeps weights within the
    cells' range, and evaluates as chips. Takes plain ``TrainingArguments``; everything else works as in ``Trainer``.

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
        ValueError: the model is not patched and there is no config, or a bad time or number of chips.
    """

    model: Any

    def __init__(
        self,
        *args,
        reram_config: ReRAMConfig | None = None,
        teacher: nn.Module | None = None,
        teacher_weight: float = 1.0,
        teacher_temperature: float = 1.0,
        eval_times: Sequence[str | float] = (),
        eval_chips: int = 3,
        calibration_dataset=None,
        freeze_batch_norm: bool = False,
        **kwargs,
    ):
        if not 0 <= teacher_weight <= 1:
            raise ValueError(f"teacher_weight={teacher_weight!r}: allowed is a number from 0 to 1")
        if not 0 < teacher_temperature < math.inf:
            raise ValueError(f"teacher_temperature={teacher_temperature!r}: allowed is a number above 0")
        if isinstance(eval_chips, bool) or not isinstance(eval_chips, int) or eval_chips < 1:
            raise ValueError(f"eval_chips={eval_chips!r}: allowed is an integer of at least 1")
        if isinstance(eval_times, str):
            eval_times = [eval_times]
        self.reram_config: Any = reram_config
        self.teacher, self.teacher_weight, self.teacher_temperature = None, teacher_weight, teacher_temperature
        self.eval_times, self.eval_chips = [parse_time(t) for t in eval_times], eval_chips
        self.calibration_dataset, self.freeze_batch_norm = calibration_dataset, freeze_batch_norm
        self._sums: dict[str, Tensor] = {}
        self._logged_step = 0
        self._looked_at_loss = False
        super().__init__(*args, **kwargs)
        self._prepare_crossbars(self.model)
        if teacher is not None:
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        if self.label_names and self.teacher is not None:
            self.can_return_loss = True
        self.add_callback(_HoldWeights(self))

    # Set-up

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if hasattr(self, "data_collator"):  # a later call, from train(): the first is prepared by __init__
            self._prepare_crossbars(model.to(self.args.device))
        return model

    def _prepare_crossbars(self, model: nn.Module) -> None:
        patched = bool(crossbar_layers(model))
        if patched and self.reram_config is not None:
            state = crossbar_state(model)
            if state.config.to_dict() != self.reram_config.to_dict():
                unpatch_model(model)
                patched = False
        if not patched:
            if self.reram_config is None:
                raise ValueError("the model is not patched: ReRAMTrainer needs reram_config=ReRAMConfig(...)")
            patch_model(model, self.reram_config)
        state = crossbar_state(model)
        self.reram_config = state.config
        calibrated = all(layer.calibrated for layer in crossbar_layers(model).values())
        needs_sensitivity = state.term == "sensitivity"
        if calibrated and not needs_sensitivity:
            return
        batches = self._calibration_batches()
        if batches is None:
            return  # evaluated only: layers then span each batch's own range, or were calibrated by hand
        with torch.random.fork_rng():  # so that training does not depend on whether calibration was needed
            if calibrated:
                measure_sensitivity(model, list(batches))
            else:
                calibrate(model, batches)

    def _calibration_batches(self) -> Iterable | None:
        dataset = self.calibration_dataset if self.calibration_dataset is not None else self.train_dataset
        if dataset is None:
            return None
        # Not get_train_dataloader: every process must see the same batches, and training none of them consumed.
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="calibration")
        shuffle = has_length(dataset) and not isinstance(dataset, IterableDataset)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.args.seed) if shuffle else None,
            collate_fn=self.data_collator,
        )
        return (batch for batch, _ in zip(loader, range(self.reram_config.calibration_batches)))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [n for n in super().get_decay_parameter_names(model) if not n.endswith("input_range")]

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As ``Trainer.train``. Checkpoints whose saving was interrupted are set aside, so that ``True`` resumes from
        the last whole one; :func:`hf_reram.training.checkpoints.last_checkpoint` finds it.

        Raises:
            FloatingPointError: the loss is NaN or infinite; says which layer made it so.
        """
        if self.is_world_process_zero():
            set_incomplete_aside(self.args.output_dir or ".")
        self.accelerator.wait_for_everyone()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer's, but a training that was finished before it was resumed gets no step more, which would make
        other weights of those that were evaluated."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        kept = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):  # Trainer reads the loss here too, to keep it out of its log
            with self.compute_loss_context_manager(), sampled_drift(self.model):
                why = explain(self.model, lambda: self.model(**self._prepare_inputs(kept)))
            raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is {float(loss)}: {why}")
        return loss

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
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.freeze_batch_norm:
            freeze_batch_norm(self.model)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs and not self._looked_at_loss:
            self._look_at_loss(model, inputs, num_items_in_batch)
        state = crossbar_state(self.model)
        state.noise_seed = layer_seed(self.args.seed, f"step {self.state.global_step}")
        state.measure = state.term != "output" and self._measures_next()
        consistency = state.config.retention_loss == "consistency"
        kept = dict(inputs)
        with sampled_drift(self.model):
            task_loss, outputs = self._task_loss(model, inputs, kept, num_items_in_batch)
        scaled = self._scaled_for_ga(num_items_in_batch)
        steps = getattr(self, "current_gradient_accumulation_steps", 1)
        # Per micro-batch; the Trainer divides the whole loss by the steps unless it is scaled already.
        weight = state.config.retention_weight / (steps if scaled else 1)
        loss, retention = task_loss, None
        if state.term is not None:
            loss, retention = add_retention_loss(task_loss, self.model, weight)
        elif consistency:
            measured, state.measure = state.measure, False
            ratios = dict(state.ratios)
            with sampled_drift(self.model, "drift"):
                retention = divergence(model(**self._without_labels(kept)), outputs)
            state.measure, state.ratios = measured, ratios
            loss, retention = task_loss + weight * retention, retention.detach()
        ratio = noise_to_signal(self.model)
        self._count("task_loss", task_loss.detach().float() / (1 if scaled else steps))
        if retention is not None:
            self._count("retention_loss", retention.float() / steps)
        if ratio:
            mean = torch.tensor([sum(ratio.values()) / len(ratio), 1.0], device=self.args.device)
            self._count("noise_to_signal", mean)
            if retention is None:
                self._count("retention_loss", mean)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _look_at_loss(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> None:
        """See whether the model divides its loss by ``num_items_in_batch``. Trainer believes that of every model that
        takes ``**kwargs``; where one averages over the batch nevertheless (BertForSequenceClassification), processes
        and accumulated batches would add up instead of being averaged, and the retention loss would weigh less."""
        self._looked_at_loss = True
        if self.args.world_size * self.args.gradient_accumulation_steps == 1:
            return
        model.eval()
        try:
            one, half = (getattr(model(**inputs, num_items_in_batch=count * times), "loss", None) for times in (1, 2))
        finally:
            model.train()
        if one is not None and half is not None and torch.allclose(one.float(), half.float(), rtol=1e-3):
            self.model_accepts_loss_kwargs = False

    def _task_loss(self, model, inputs, kept, num_items_in_batch):
        if self.teacher is None:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        heat = self.teacher_temperature
        with torch.no_grad():
            guide = self.teacher(**self._without_labels(kept))
        if self.teacher_weight == 1.0 or not any(name in kept for name in self.label_names):
            outputs = model(**self._without_labels(kept))
            return self._ga_mean(divergence(outputs, guide, heat), num_items_in_batch), outputs
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        guided = self._ga_mean(divergence(outputs, guide, heat), num_items_in_batch)
        return (1 - self.teacher_weight) * loss + self.teacher_weight * guided, outputs

    def _without_labels(self, inputs: dict) -> dict:
        return {key: value for key, value in inputs.items() if key not in self.label_names}

    def _scaled_for_ga(self, num_items_in_batch) -> bool:
        """Whether the task loss is already normalized over the accumulated batch; as in Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _ga_mean(self, loss: Tensor, num_items_in_batch) -> Tensor:
        return loss / self.current_gradient_accumulation_steps if self._scaled_for_ga(num_items_in_batch) else loss

    # The Hub

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write card, report and plot into ``output_dir``; the arguments are those of ``Trainer.create_model_card``.

        The figures are those of the last :meth:`evaluate_robustness`, if the weights are still the same. What a person
        has written in the card stays.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        report = report_of(self.model)
        if report is None:
            report = unmeasured(self.model)
        known = {
            "name": model_name,
            "repo": self.hub_model_id or self.args.hub_model_id,
            "base_model": finetuned_from,
            "task": tasks if isinstance(tasks, str) else None,
            "dataset": _first(dataset_tags) or _first(dataset),
            "dataset_split": _first(dataset_args),
        }
        known = {key: value for key, value in known.items() if value is not None}
        if report.about:
            report.about |= {key: value for key, value in known.items() if report.about.get(key) in (None, "")}
        else:
            report.about = about_model(self.model, report, training=[self._training_note()], **known).to_dict()
        if not report.about.get("training"):
            report.about["training"] = [self._training_note()]
        report.about |= {key: known[key] for key in ("name", "repo") if key in known}
        extra = {"language": language, "license": license, "tags": tags}
        publish(folder, report, metadata={key: value for key, value in extra.items() if value is not None})

    def _training_note(self) -> str:
        args = self.args
        size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return f"{self.state.global_step} steps of {size} examples, learning rate {args.learning_rate:g}"

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Upload weights, config, tokenizer or image processor, robustness report, plot and card in one commit.

        Differs from ``Trainer.push_to_hub`` in that nothing that would have to be unpickled goes up, nor what else
        stands in ``output_dir``'s folders.

        Args:
            kwargs: see :meth:`create_model_card`.

        Returns:
            the commit, or with ``blocking=False`` a Future of it; None on other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        revision = revision if revision is not None else self.args.hub_revision

        folder, repo = self.args.output_dir or ".", str(self.hub_model_id)

        def upload():
            return push(folder, repo, None, token, revision, commit_message, verify=False)

        return upload() if blocking else HfApi().run_as_future(upload)

    # Logging

    def _measures_next(self) -> bool:
        """Whether the step under way measures noise-to-signal ratios although its loss does not need them: one in as
        many as are logged together."""
        if self.args.logging_strategy == IntervalStrategy.NO:
            return False
        every = max(int(self.state.logging_steps or 0), 1)
        every = every if self.args.logging_strategy == IntervalStrategy.STEPS else min(every, 10)
        return (self.state.global_step + 1) % every == 0 or self.state.global_step == 0

    def _count(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._logged_step, 1)
            for name, total in self._sums.items():
                total = self.accelerator.reduce(total, reduction="mean")
                logs[name] = float(total[0] / total[1]) if total.dim() else float(total) / steps
            self._sums.clear()
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        measure = super().evaluation_loop
        output = measure(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = output.metrics or {}
        for time in self.eval_times if metric_key_prefix.startswith("eval") else ():
            prefix = f"{metric_key_prefix}_{format_time(time)}"
            chips = []
            for seed in range(self.eval_chips):
                with deploy(self.model, time, seed=seed):
                    one = measure(dataloader, description, prediction_loss_only, ignore_keys, prefix)
                chips.append(_numbers_of(one.metrics, prefix))
            for name in chips[0]:
                metrics[name] = sum(chip[name] for chip in chips) / len(chips)
        return output

    def evaluate_robustness(
        self,
        times: Sequence[str | float] = DEFAULT_TIMES,
        temperatures: Sequence[float | None] = (None,),
        seeds: int | Iterable[int] = 10,
        eval_dataset=None,
        metrics: Sequence[str] | None = None,
        **kwargs,
    ) -> RobustnessReport:
        """The model as chips over time, on ``eval_dataset``; see :func:`hf_reram.evaluate_robustness`.

        Args:
            metrics: which of the metrics to keep, with or without the prefix "eval_"; None keeps all.

        Raises:
            ValueError: ``metrics`` names one that the evaluation does not give.
        """
        dataloader = self.get_eval_dataloader(eval_dataset)

        def evaluate(model) -> dict[str, float]:
            output = super(ReRAMTrainer, self).evaluation_loop(dataloader, "chips", metric_key_prefix="eval")
            found = {k.removeprefix("eval_"): v for k, v in _numbers_of(output.metrics, "eval").items()}
            if metrics is None:
                return found
            wanted = [name.removeprefix("eval_") for name in metrics]
            if missing := [name for name in wanted if name not in found]:
                raise ValueError(f"metrics={missing!r}: allowed are {sorted(found)}")
            return {name: found[name] for name in wanted}

        bars, self.args.disable_tqdm = self.args.disable_tqdm, True
        callbacks = self.callback_handler.callbacks
        self.callback_handler.callbacks = []  # no progress bar per chip, no prediction events
        try:
            return evaluate_robustness(self.model, evaluate, times, temperatures, seeds, **kwargs)
        finally:
            self.args.disable_tqdm, self.callback_handler.callbacks = bars, callbacks


class _HoldWeights(TrainerCallback):
    """After each optimizer step, back into the cells' range."""

    def __init__(self, trainer: ReRAMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._sums.clear()
        self.trainer._logged_step = state.global_step
        hold_weights(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        hold_weights(self.trainer.model)


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, list) and value else value if isinstance(value, str) else None


def _numbers_of(metrics: dict[str, Any] | None, prefix: str) -> dict[str, float]:
    timing = f"{prefix}_model_preparation_time"
    return {k: float(v) for k, v in (metrics or {}).items() if k != timing and isinstance(v, (int, float))}
