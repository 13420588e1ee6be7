"""What is said where a Trainer without the mixin trains a model on crossbars."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_reram import ReRAMConfig, ReRAMTrainer, add_retention_loss, calibrate, digital, patch_model, sampled_drift
from tests.samples.models import bert_batch, tiny_bert


class Drifting(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with sampled_drift(self.model):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)


class Adding(Trainer):
    """Of two forwards, as a contrastive loss has them."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return add_retention_loss(model(**inputs).loss + model(**inputs).loss, self.model)[0]


class Consistent(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        clean = model(**inputs)
        with sampled_drift(self.model, "drift"):
            return clean.loss + (model(**inputs).logits - clean.logits).square().mean()


class Stepping(Trainer):
    """With a training step that calls no other."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model.train()(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


def patched(loss):
    return calibrate(patch_model(tiny_bert(num_hidden_layers=1), ReRAMConfig(retention_loss=loss)), [bert_batch()])


def train(tmp_path, kind, model, **options):
    args = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True)
    batch = bert_batch(8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    trainer = kind(model, args, train_dataset=data, eval_dataset=data, **options)
    trainer.train()
    trainer.evaluate()


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hf_reram.integrations.plain_trainer"]


@pytest.mark.parametrize("kind", [Trainer, Stepping])
@pytest.mark.parametrize("loss", ["drift", "noise", "output", "sensitivity+drift", "consistency"])
def test_a_plain_trainer_is_told_once(tmp_path, caplog, kind, loss):
    model, name = patched(loss), kind.__name__
    for _ in range(2):
        train(tmp_path, kind, model)
    (text,) = told(caplog)
    assert text.startswith(f"{name} trains a model on crossbars without retention_loss={loss!r}: it samples no drift")
    assert f"class MyTrainer(ReRAMTrainerMixin, {name})" in text


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (Trainer, "none"),
        (Drifting, "drift"),
        (Adding, "output"),
        (Consistent, "consistency"),
        *((ReRAMTrainer, loss) for loss in ("drift", "output", "sensitivity+drift", "consistency")),
    ],
)
def test_who_tends_to_the_retention_is_not(tmp_path, caplog, kind, loss):
    train(tmp_path, kind, patched(loss))
    assert not told(caplog)


def test_loops_of_ones_own_and_evaluations_are_not(tmp_path, caplog):
    model, batch = patched("drift").train(), bert_batch()
    for _ in range(2):
        model(**batch).loss.backward()
    with digital(model):
        train(tmp_path, Trainer, model)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    Trainer(model, args, eval_dataset=[{key: value[0] for key, value in batch.items()}]).evaluate()
    assert not told(caplog)
    assert torch.isfinite(model(**batch).loss)
