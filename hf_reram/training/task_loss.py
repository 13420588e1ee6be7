"""The part of a Trainer that has nothing to do with crossbars: the task loss, of labels, a teacher, or both."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..calibration.batch_norm import freeze_batch_norm
from ..model.find import unwrapped
from ..model.inputs import decoder_inputs, evaluating, find_logits, without_cache
from .distillation import check_temperature, divergence

# Of Trainer, beside which the mixin stands.
Base: Any = object


class TaskLossMixin(Base):
    """The task loss of :class:`hf_reram.ReRAMTrainerMixin`: the model's own, the divergence from a teacher, or a mix.
    Takes the trainer's arguments and, by keyword, ``teacher``, ``teacher_weight``, ``teacher_temperature`` and
    ``freeze_batch_norm``, which are described there.

    Raises:
        ValueError: a teacher's weight outside [0, 1], a temperature that is not above 0, or a teacher that shares
            modules or trained parameters with the model.
    """

    model: Any

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        teacher_weight: float = 1.0,
        teacher_temperature: float = 1.0,
        freeze_batch_norm: bool = False,
        **kwargs,
    ):
        if not 0 <= teacher_weight <= 1:
            raise ValueError(f"teacher_weight={teacher_weight!r}: allowed is a number from 0 to 1")
        check_temperature("teacher_temperature", teacher_temperature)
        self.teacher, self.teacher_weight, self.teacher_temperature = None, teacher_weight, teacher_temperature
        self.teacher_given, self.freeze_batch_norm = teacher is not None, freeze_batch_norm
        self._looked_at_loss = self._guided = False
        super().__init__(*args, **kwargs)
        if teacher is not None:
            _refuse_shared(teacher, self.model)
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
            self.teacher.register_forward_pre_hook(self._note_guide)
            if self.label_names:
                self.can_return_loss = True

    def compute_loss_context_manager(self) -> Any:
        """As ``Trainer``'s, around whatever ``compute_loss`` there is, with batch norm frozen where that is wanted."""
        if self.freeze_batch_norm:
            freeze_batch_norm(self.model)  # which model.train() has just ended
        return super().compute_loss_context_manager()

    def training_step(self, *args, **kwargs) -> Tensor:
        self._guided = False
        loss = super().training_step(*args, **kwargs)
        self._refuse_unguided("compute_loss")
        return loss

    def _refuse_unguided(self, method: str) -> None:
        """
        Raises:
            RuntimeError: in a step with a method of one's own the teacher taught nothing.
        """
        if self.teacher is not None and not self._guided:
            raise RuntimeError(
                f"{type(self).__name__}.{method} neither calls super().{method} nor self.teacher, so that teacher= "
                "teaches nothing: call one of them"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The trainer's own, and in training the teacher's divergence in its place or beside it."""
        if model.training and num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            self._look_at_loss(model, inputs, num_items_in_batch)
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept, heat, share = self.without_labels(inputs), self.teacher_temperature, self.teacher_weight
        with torch.no_grad():
            guide = self.teacher(**{**without_cache(self.teacher), **kept})
        loss = outputs = None
        if share < 1 and any(name in inputs for name in self.label_names):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs is None or not any(logits.requires_grad for logits in find_logits(outputs).values()):  # as of trl's
            outputs = model(**kept)
        guided = divergence(outputs, guide, heat, model=model)
        if self.is_scaled(num_items_in_batch):
            guided = guided / self.current_gradient_accumulation_steps
        loss = guided if loss is None else (1 - share) * loss + share * guided
        return (loss, outputs) if return_outputs else loss

    def _note_guide(self, *_) -> None:
        self._guided = True

    def without_labels(self, inputs: dict) -> dict:
        """What a forward needs beside labels; of an encoder-decoder that makes its decoder's tokens of them, these."""
        kept = {key: value for key, value in inputs.items() if key not in self.label_names}
        return kept | decoder_inputs(self.model, inputs)

    # Scaling over accumulated batches and processes

    @torch.no_grad()
    def _look_at_loss(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> None:
        """See whether the model divides its loss by ``num_items_in_batch``. Trainer believes that of every model that
        takes ``**kwargs``; where one averages over the batch nevertheless (BertForSequenceClassification), processes
        and accumulated batches would add up instead of being averaged, and the retention loss would weigh less."""
        if self._looked_at_loss:
            return
        asked = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        if not asked or self.args.world_size * self.args.gradient_accumulation_steps == 1:
            self._looked_at_loss = True  # another trainer knows how its own loss is scaled
            return
        with evaluating(model):
            one, half = (getattr(model(**inputs, num_items_in_batch=count * times), "loss", None) for times in (1, 2))
        told = torch.zeros((), device=self.args.device)  # 1: it divides, 2: it does not
        if one is not None and half is not None and torch.isfinite(one) and one != 0:  # else without labels
            told += 2 if torch.allclose(one.float(), half.float(), rtol=1e-3) else 1
        told = self.accelerator.gather(told[None]).max()
        self._looked_at_loss = bool(told > 0)
        if told == 2:
            self.model_accepts_loss_kwargs = False

    def is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the task loss is already normalized over the accumulated batch; as in Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None


def _refuse_shared(teacher: nn.Module, model: nn.Module) -> None:
    """
    Raises:
        ValueError: the teacher is the model that is trained, or has a module with parameters in common with it, which
            would be on crossbars, or a parameter that is trained.
    """
    if unwrapped(teacher) is unwrapped(model):
        raise ValueError("teacher is the model that is trained: allowed is another one, such as a copy.deepcopy of it")
    modules, trained = set(model.modules()), {p for p in model.parameters() if p.requires_grad}
    shared = [name for name, module in teacher.named_modules() if module in modules and module._parameters]
    trainable = [name for name, p in teacher.named_parameters() if p in trained]
    shared += [name for name in trainable if name.rpartition(".")[0] not in shared]
    if shared:
        names = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise ValueError(
            f"teacher shares {len(shared)} modules or parameters with the model that is trained ({names}): allowed is "
            "a model with its own, such as a copy.deepcopy of it"
        )
