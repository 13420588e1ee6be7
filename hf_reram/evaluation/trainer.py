"""The part of a Trainer that evaluates a model as chips."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..device.checks import plain
from ..device.time import format_time, parse_time
from ..model.deploy import deploy
from ..model.digest import settings_of
from ..model.find import is_digital
from .content import Evaluated, content_of
from .precision import restored
from .report import RobustnessReport, Statistic
from .robustness import DEFAULT_TIMES, evaluate_robustness, refuse_untold

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.get_logger(__name__)

# Of Trainer, beside which the mixin stands.
Base: Any = object


class EvaluationMixin(Base):
    """What :class:`hf_reram.ReRAMTrainerMixin` does to evaluate: chips beside every evaluation, and whole robustness
    reports."""

    def __init__(self, *args, eval_times: Sequence[str | float] = (), eval_chips: int = 3, **kwargs):
        eval_chips = plain(eval_chips)
        if isinstance(eval_chips, bool) or not isinstance(eval_chips, int) or eval_chips < 1:
            raise ValueError(f"eval_chips={eval_chips!r}: allowed is an integer of at least 1")
        if isinstance(eval_times, str):
            eval_times = [eval_times]
        self._loaded: dict[str, Any] = {}  # data sets, by what the trainer keeps their loaders under
        self.eval_times, self.eval_chips = list(dict.fromkeys(parse_time(t) for t in eval_times)), eval_chips
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> "EvalLoopOutput":
        measure = self._uncast(super().evaluation_loop)
        output = measure(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = output.metrics or {}
        wanted = bool(self.eval_times) and metric_key_prefix.startswith("eval")
        for time in self.eval_times if wanted and not is_digital(self.model) else ():
            prefix = f"{metric_key_prefix}_{format_time(time)}"
            chips = []
            for seed in range(self.eval_chips):
                with deploy(self.model, time, seed=seed):
                    one = measure(dataloader, description, prediction_loss_only, ignore_keys, prefix)
                chips.append(_numbers_of(one.metrics, prefix))
            for name in dict.fromkeys(name for chip in chips for name in chip):
                found = Statistic.of(chip[name] for chip in chips if name in chip)
                metrics[name] = found.mean
                if found.chips < len(chips):
                    logger.warning(
                        "%s is not finite or missing on %d of %d chips: its mean is over the others",
                        name,
                        len(chips) - found.chips,
                        len(chips),
                    )
        return output

    def _uncast(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        """An evaluation after which the model has its own dtype: ``bf16_full_eval`` and ``fp16_full_eval`` cast it in
        place, and what is trained or saved next would be rounded."""

        def measured(*args, **kwargs) -> Any:
            casts = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
            with restored(self.model) if casts else nullcontext():
                return measure(*args, **kwargs)

        return measured

    def get_eval_dataloader(self, eval_dataset=None):
        """As ``Trainer.get_eval_dataloader``, which with ``dataloader_persistent_workers`` keeps the loaders of all
        data sets that it is not asked for by a name under one: of another data set than it keeps, a new one."""
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if self._loaded.get(name) is not dataset:
            vars(self).get("_eval_dataloaders", {}).pop(name, None)
        self._loaded[name] = dataset
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_dataset(self, dataset: Any) -> Any:
        """A data set that an evaluation is given, as the trainer's data loader takes it."""
        return dataset

    def _evaluation_key(self, loaders: Mapping[str, Any], metrics: Sequence[str] | None, log: Any) -> dict[str, Any]:
        """What figures depend on beside the model, as JSON values by what they are of.

        Args:
            log: the file that they are noted in.
        """
        refuse_untold(settings_of(self.model))
        data = {name.removesuffix("_"): content_of(loader.dataset) for name, loader in loaders.items()}
        return {
            **{f"data.{name}" if name else "data": content for name, content in data.items()},
            "metrics": None if metrics is None else list(metrics),
            "precision": [self.accelerator.mixed_precision, self.is_cast()],
            **Evaluated(self.model, log, self.eval_dataset).key("trainer", self),
        }

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
            eval_dataset: None takes the trainer's; of a dict (or ``DatasetDict``) of data sets each metric has the data
                set's name before it, as in ``Trainer.evaluate``.
            metrics: which of the metrics to keep, with or without the prefix "eval_"; None keeps all.
            kwargs: of :func:`hf_reram.evaluate_robustness`. The ``key`` of a ``resume`` file, where none is given, is
                made of the data sets' content, the trainer's functions (as ``compute_metrics``), the arguments that an
                evaluation depends on, and what a subclass of the trainer or of its arguments adds and its code, or the
                functions', reads. Several processes evaluate each chip together.

        Raises:
            ValueError: ``metrics`` names one that the evaluation does not give, a ``resume`` file without ``key`` where
                nothing tells one of the trainer's functions from another, or ``share_chips`` with several
                processes, whose parts of the data would be gathered from different chips.
        """
        if self.args.world_size > 1:
            if kwargs.get("share_chips"):
                raise ValueError(
                    f"share_chips=True: allowed is False with {self.args.world_size} processes, among which a Trainer "
                    "divides the data of each evaluation"
                )
            kwargs["together"] = True
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        several = isinstance(datasets, dict)  # as Trainer.evaluate says, a DatasetDict among them
        parts = {f"{name}_": part for name, part in datasets.items()} if several else {"": eval_dataset}
        loaders = {name: self.get_eval_dataloader(self.evaluation_dataset(part)) for name, part in parts.items()}
        measure = self._uncast(super().evaluation_loop)
        self.prepare_generation()
        if kwargs.get("resume") is not None and kwargs.get("key") is None:
            kwargs["key"] = self._evaluation_key(loaders, metrics, kwargs["resume"])

        loss_only = True if self.compute_metrics is None else None  # as in Trainer.evaluate: no logits are kept

        def evaluate(model) -> dict[str, float]:
            found = {}
            for name, loader in loaders.items():
                output = measure(loader, "chips", loss_only, metric_key_prefix="eval")
                for metric, value in _numbers_of(output.metrics, "eval").items():
                    found[name + metric.removeprefix("eval_")] = value
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
            report = evaluate_robustness(self.model, evaluate, times, temperatures, seeds, **kwargs)
        finally:
            self.args.disable_tqdm, self.callback_handler.callbacks = bars, callbacks
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            dtype = "float16" if self.args.fp16_full_eval else "bfloat16"
            report.notes.append(f"evaluated in {dtype}, to which weights were rounded for it")
        return report


def _numbers_of(metrics: dict[str, Any] | None, prefix: str) -> dict[str, float]:
    timing = f"{prefix}_model_preparation_time"
    return {k: float(v) for k, v in (metrics or {}).items() if k != timing and isinstance(v, (int, float))}
