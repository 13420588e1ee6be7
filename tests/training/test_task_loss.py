"""Training off the crossbars, the control of a comparison: against the same step computed by hand."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForTokenClassification, EarlyStoppingCallback, Trainer

from hf_reram import ReRAMConfig, ReRAMTrainer, crossbar_layers, digital
from hf_reram.model.find import is_digital
from tests.samples.models import bert_batch, tiny_bert
from tests.training.test_trainer import arguments, examples, fresh_bert, trainer_of

NONE = ReRAMConfig(retention_loss="none")


def one_step(base, share=None, accumulated=1, **options):
    steps = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    steps |= {"per_device_train_batch_size": 16 // accumulated, "gradient_accumulation_steps": accumulated}
    teaching = {} if share is None else {"teacher_weight": share, "teacher_temperature": 2.0}
    return {"model": copy.deepcopy(base), "arguments_": steps, "config": NONE, **teaching, **options}


def expect_step(model, base, loss):
    """That the model is the base after a step of gradient descent along the loss."""
    loss.backward()
    moved = 0
    for (name, own), parameter in zip(model.named_parameters(), base.parameters(), strict=True):
        expected = parameter.detach() - (0 if parameter.grad is None else 0.1 * parameter.grad)
        torch.testing.assert_close(own.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
        moved += float((expected - parameter).abs().max()) > 1e-5
    assert moved > 3


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_follows_labels_and_teacher_as_the_loss_says(tmp_path, share, accumulated):
    base, teacher = fresh_bert(), fresh_bert(1)
    teacher.classifier.weight.data.mul_(30)
    trainer = trainer_of(tmp_path, data=examples(16), teacher=teacher, **one_step(base, share, accumulated))
    trainer.train_digitally()
    batch = {name: torch.stack([row[name] for row in examples(16)]) for name in examples(1)[0]}
    logits = base(**batch).logits
    with torch.no_grad():
        guide = teacher(**{name: value for name, value in batch.items() if name != "labels"}).logits
    divergence = F.kl_div((logits / 2).log_softmax(-1), (guide / 2).log_softmax(-1), log_target=True, reduction="sum")
    expect_step(
        trainer.model, base, (1 - share) * F.cross_entropy(logits, batch["labels"]) + share * divergence / 16 * 2**2
    )


def test_padding_is_left_out_of_the_teachers_part(tmp_path):
    config = tiny_bert(num_hidden_layers=1).config
    base, teacher = (BertForTokenClassification(config).train() for _ in range(2))
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    batch = {name: value for name, value in bert_batch(16).items() if name != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 3:] = 0
    rows = [{name: value[i] for name, value in batch.items()} for i in range(16)]
    trainer = trainer_of(tmp_path, data=rows, teacher=teacher, **one_step(base))
    trainer.train_digitally()
    logits, guide = base(**batch).logits[:, :3], teacher(**batch).logits[:, :3].detach()
    loss = F.kl_div(logits.log_softmax(-1), guide.log_softmax(-1), log_target=True, reduction="sum") / (16 * 3)
    expect_step(trainer.model, base, loss)


def test_weights_leave_the_cells_range_and_evaluations_are_the_trainers(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.05, "save_strategy": "steps"}
    steps |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    more = {"eval_dataset": examples(8), "callbacks": [EarlyStoppingCallback(3)]}
    trainer = trainer_of(tmp_path, NONE, arguments_=steps, **more)
    trainer.train_digitally()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4
    layers = crossbar_layers(trainer.model).values()
    assert any((layer.weight.abs() > layer.held_scale() * 1.01).any() for layer in layers)
    with digital(trainer.model):
        assert trainer.evaluate()["eval_loss"] > 0


def test_a_digital_training_has_no_retention_loss(tmp_path):
    with pytest.raises(ValueError, match="retention_loss='output' in a digital training: allowed is 'none'"):
        trainer_of(tmp_path).train_digitally()


def test_a_model_that_is_made_anew_is_trained_digitally_too(tmp_path):
    base, args = fresh_bert(), arguments(tmp_path, learning_rate=0.01)
    plain = Trainer(copy.deepcopy(base), args, train_dataset=examples())
    plain.train()
    calls = []
    for model in ({"model": copy.deepcopy(base)}, {"model_init": lambda: copy.deepcopy(base)}):
        trainer = ReRAMTrainer(**model, args=args, train_dataset=examples(), reram_config=NONE)
        trainer.train_digitally()
        counters = [layer.counter for layer in crossbar_layers(trainer.model).values()]
        calls.append({(counter.calls, counter.digital_calls) for counter in counters})
        for (name, own), expected in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7, msg=name)
        assert not is_digital(trainer.model)
    assert calls[0] == calls[1] == {(0, 4 + 8)}  # steps, and calibration's


def test_evaluations_of_a_digital_training_measure_no_chips(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, NONE, arguments_=steps, eval_dataset=examples(8), eval_times=["1d"])
    trainer.train_digitally()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and not any(name.startswith("eval_1d") for entry in found for name in entry)
    assert trainer.evaluate().keys() >= {"eval_loss", "eval_1d_loss"}
