import copy
import gc
import json
import logging
import shutil
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.utils.data import IterableDataset
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    RobustnessReport,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    evaluate_robustness,
    patch_model,
    report_of,
)
from hf_reram.config import RETENTION_LOSSES
from hf_reram.hub.push import prepare
from hf_reram.training.checkpoints import CONFIGS
from tests.samples import models
from tests.samples.devices import device
from tests.samples.models import bert_batch


def fresh_bert(seed=0):
    set_seed(seed)
    return models.tiny_bert(num_hidden_layers=1).train()


def examples(n=32, labels=True):
    batch = bert_batch(n)
    keys = [k for k in batch if labels or k != "labels"]
    return [{k: batch[k][i] for k in keys} for i in range(n)]


def arguments(folder, kind=TrainingArguments, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**defaults, **options})


def trainer_of(folder, config=None, model=None, data=None, arguments_=None, **options):
    return ReRAMTrainer(
        model or fresh_bert(),
        arguments(folder, **(arguments_ or {})),
        train_dataset=data or examples(),
        reram_config=config or ReRAMConfig(retention_loss="output", retention_weight=2.0),
        **options,
    )


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("loss", RETENTION_LOSSES)
def test_every_retention_loss_trains_and_logs(tmp_path, loss):
    trainer = trainer_of(tmp_path, ReRAMConfig(retention_loss=loss, retention_times=["1s", "1d"]))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert 0 < entry["noise_to_signal"] < 10
        if loss in ("none", "noise", "drift"):  # nothing is added; what "output" would be is logged for information
            assert entry["loss"] == pytest.approx(entry["task_loss"], rel=1e-4)
            assert entry["retention_loss"] == pytest.approx(entry["noise_to_signal"])
        else:
            total = entry["task_loss"] + entry["retention_loss"] * trainer.reram_config.retention_weight
            assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    for layer in crossbar_layers(trainer.model).values():
        assert (layer.weight.abs() <= layer.held_scale()).all()


def gradients(folder, config, **options):
    """Gradients and task loss of the first optimizer step."""
    found = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not found:
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    once = {"max_steps": 1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", **options}
    trainer = trainer_of(folder, config, arguments_=once, data=examples(16), callbacks=[Catch()])
    trainer.train()
    return found, trainer.state.log_history[0]


@pytest.mark.parametrize("loss", ["weight", "sensitivity", "drift", "sensitivity+drift", "noise"])
def test_accumulating_four_by_four_is_one_batch_of_sixteen(tmp_path, loss):
    config = ReRAMConfig(retention_loss=loss, calibration_batches=1)
    whole, log = gradients(tmp_path, config, per_device_train_batch_size=16)
    config = ReRAMConfig(retention_loss=loss, calibration_batches=4)
    parts, log2 = gradients(tmp_path, config, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert log2["task_loss"] == pytest.approx(log["task_loss"], rel=0.02)
    assert whole.keys() == parts.keys()
    flat, other = (torch.cat([g.flatten() for g in d.values()]) for d in (whole, parts))
    # Calibration saw the same examples in other batches, so that sampled statistics differ slightly.
    assert float(torch.nn.functional.cosine_similarity(flat, other, 0)) > 0.98


def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    config = {"retention_loss": "sensitivity+drift"}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "a", ReRAMConfig(**config), arguments_=options)
    whole.train()
    again = trainer_of(tmp_path / "a", ReRAMConfig(**config), arguments_=options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for key in ("loss", "task_loss", "retention_loss"):
        one, two = ([e[key] for e in t.state.log_history if "loss" in e] for t in (whole, again))
        assert two[3:] == pytest.approx(one[3:], rel=1e-5)


@pytest.mark.parametrize("options", [{"save_strategy": "steps", "save_steps": 8}, {"save_strategy": "epoch"}])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, options):
    """Bit for bit, and so the numbers that follow the weights, also from the end of an epoch."""
    options = {"max_steps": -1, "num_train_epochs": 4, "learning_rate": 5e-3, "logging_steps": 8, **options}
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-16")):
        trainer = trainer_of(tmp_path, ReRAMConfig(), arguments_=options, data=examples(64))
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(trainer.model.state_dict())
        assert all("clamped" in log for log in trainer.state.log_history if "loss" in log)  # at the steps of saving
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_finished_training_that_is_resumed_keeps_its_weights(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trainer_of(tmp_path, ReRAMConfig(), arguments_=options)
    whole.train()
    again = trainer_of(tmp_path, ReRAMConfig(), arguments_=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    one, two = (t.model.state_dict() for t in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_best_model_is_selected_by_a_metric_of_aged_chips(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_1d_accuracy",
        "max_steps": 6,
    }
    trainer = trainer_of(
        tmp_path,
        arguments_=options,
        eval_dataset=examples(24),
        compute_metrics=accuracy,
        eval_times=["1d"],
        eval_chips=2,
        callbacks=[EarlyStoppingCallback(5)],
    )
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == max(e["eval_1d_accuracy"] for e in evaluations)
    assert "eval_1d_loss" in evaluations[0]


def test_custom_loss_and_label_smoothing(tmp_path):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels) * 7

    seven = trainer_of(tmp_path, compute_loss_func=loss_of)
    seven.train()
    plain = trainer_of(tmp_path)
    plain.train()
    smooth = trainer_of(tmp_path, arguments_={"label_smoothing_factor": 0.2})
    smooth.train()
    first = [t.state.log_history[0] for t in (seven, plain, smooth)]
    assert first[0]["task_loss"] == pytest.approx(7 * first[1]["task_loss"], rel=1e-4)
    assert first[2]["task_loss"] != first[1]["task_loss"]
    assert first[0]["retention_loss"] == pytest.approx(first[1]["retention_loss"], rel=1e-4)


def test_a_teacher_needs_no_labels(tmp_path):
    teacher = fresh_bert(7)
    with torch.no_grad():
        teacher.classifier.weight *= 30  # predictions that are worth learning
    options = {"data": examples(labels=False), "teacher": teacher, "arguments_": {"max_steps": 20}}
    trainer = trainer_of(tmp_path, ReRAMConfig(retention_loss="none"), **options)
    trainer.train()
    losses = [e["task_loss"] for e in trainer.state.log_history if "loss" in e]
    assert 0 <= losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["labels", "tokens"])
@pytest.mark.parametrize("way", ["teacher", "consistency"])
def test_teachers_and_consistency_count_what_the_head_predicts(tmp_path, kind, way):
    """Labels each for itself, and no padding, against torch.distributions."""
    config = models.tiny_bert(
        problem_type="multi_label_classification" if kind == "labels" else None, initializer_range=0.5
    ).config
    cls = BertForSequenceClassification if kind == "labels" else BertForTokenClassification
    model, teacher, batch = cls(config).train(), cls(config).eval(), bert_batch(8)
    tokens = torch.randint(3, batch["input_ids"].shape)
    batch["labels"] = tokens if kind == "tokens" else torch.rand(8, 3).round()
    guide = {"teacher": teacher} if way == "teacher" else {}
    config = ReRAMConfig(retention_loss="none" if way == "teacher" else "consistency", retention_weight=1.0)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    trainer = trainer_of(tmp_path, config, model=model, data=data, **guide)
    seen = []
    model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    found = trainer.compute_loss(model, batch)
    if way == "teacher":
        (outputs,), target = seen, teacher(batch["input_ids"], batch["attention_mask"]).logits
    else:
        (clean, outputs), target = seen, seen[0].logits
        found = found - clean.loss
    s, t = outputs.logits, target
    if kind == "tokens":
        s, t = (z[batch["attention_mask"].bool()] for z in (s, t))
        expected = kl_divergence(Categorical(logits=t), Categorical(logits=s)).mean()
    else:
        expected = kl_divergence(Bernoulli(logits=t), Bernoulli(logits=s)).sum(1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_evaluate_robustness_reports_metrics_of_the_trainer(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=examples(24), compute_metrics=accuracy)
    report = trainer.evaluate_robustness(times=["1s", "1d"], seeds=3, progress=False)
    assert isinstance(report, RobustnessReport)
    with digital(trainer.model):
        assert report.digital["accuracy"] == pytest.approx(trainer.evaluate()["eval_accuracy"])
    assert {"loss", "accuracy"} <= set(report.metrics)
    only = trainer.evaluate_robustness(times=["1d"], seeds=2, metrics=["eval_accuracy"], progress=False)
    assert only.metrics == ["accuracy"]
    with pytest.raises(ValueError, match="allowed"):
        trainer.evaluate_robustness(times=["1d"], seeds=2, metrics=["f1"], progress=False)


def test_learned_ranges_move_without_weight_decay(tmp_path):
    config = ReRAMConfig(retention_loss="none", learn_input_range=True)
    trainer = trainer_of(tmp_path, config, arguments_={"weight_decay": 0.1})
    names = [n for n, _ in trainer.model.named_parameters() if n.endswith("input_range")]
    before = {n: trainer.model.get_parameter(n).clone() for n in names}
    assert not set(names) & set(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    assert any(not torch.equal(trainer.model.get_parameter(n), before[n]) for n in names)


def test_a_patched_model_brings_its_config_and_another_config_replaces_it(tmp_path):
    model = patch_model(fresh_bert(), ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output"))
    trainer = ReRAMTrainer(model, arguments(tmp_path), train_dataset=examples())
    assert trainer.reram_config.device.name == "cmo-hfox-ibm"
    assert all(layer.calibrated for layer in crossbar_layers(model).values())
    other = ReRAMTrainer(model, arguments(tmp_path), train_dataset=examples(), reram_config=ReRAMConfig())
    assert crossbar_layers(other.model)["classifier"].crossbar.config.device.name == "hfox-neurram"


def test_a_config_of_the_trainer_leaves_digital_what_was_so_or_names_it(tmp_path, caplog):
    model = fresh_bert()
    patch_model(model.bert, ReRAMConfig(device="cmo-hfox-ibm"))
    names, moved = set(crossbar_layers(model)), "the model was on ['cmo-hfox-ibm']: put on hfox-neurram"
    for words, named in [
        ({}, None),
        ({"target_modules": "all-linear"}, "were digital before, and are on crossbars now"),
    ]:
        with caplog.at_level("WARNING", "hf_reram"):
            ReRAMTrainer(model, arguments(tmp_path), train_dataset=examples(), reram_config=ReRAMConfig(**words))
        layers = crossbar_layers(model)
        assert {layer.crossbar.config.device.name for layer in layers.values()} == {"hfox-neurram"}
        assert layers.keys() - names == ({"classifier"} if named else set()) and not names - layers.keys()
        assert all(layer.calibrated for layer in layers.values())
        told = [r.getMessage() for r in caplog.records if "reram_config names other layers" in r.getMessage()]
        assert [f"{named}: classifier" in text for text in told] == ([True] if named else [])
    assert sum(moved in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    "wrong", [{"reram_config": None}, {"eval_times": ["soon"]}, {"eval_chips": 0}, {"teacher_weight": 2}]
)
def test_bad_arguments(tmp_path, wrong):
    options = {"reram_config": ReRAMConfig(), **wrong}
    with pytest.raises(ValueError, match=r"allowed|not patched"):
        ReRAMTrainer(fresh_bert(), arguments(tmp_path), train_dataset=examples(), **options)


def test_model_init(tmp_path):
    trainer = ReRAMTrainer(
        model_init=lambda: fresh_bert(), args=arguments(tmp_path), train_dataset=examples(), reram_config=ReRAMConfig()
    )
    trainer.train()
    assert all(layer.calibrated for layer in crossbar_layers(trainer.model).values())


@pytest.mark.parametrize("loss", ["none", "weight"])
def test_accumulated_batches_are_averaged_though_the_model_ignores_how_many(tiny_bert, tmp_path, loss):
    """BertForSequenceClassification takes ``**kwargs`` but averages over the batch that it sees."""
    batch = bert_batch(16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    patch_model(tiny_bert, ReRAMConfig(retention_loss=loss))
    calibrate(tiny_bert, [batch])
    found = []
    for size, parts in ((16, 1), (4, 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_grad_norm": 1e9}
        args = TrainingArguments(
            tmp_path, max_steps=1, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", **more
        )
        trainer = ReRAMTrainer(copy.deepcopy(tiny_bert), args, train_dataset=data)
        trainer.train()
        found.append({key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm", "task_loss")})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("mode, told", [(deploy, "deployed as a chip here"), (digital, "digital here")])
def test_training_where_it_would_not_be_on_crossbars_is_refused(tmp_path, mode, told):
    trainer = trainer_of(tmp_path)
    with mode(trainer.model), pytest.raises(ValueError, match=f"the model is {told}: train it outside of"):
        trainer.train()


class OwnLoss(ReRAMTrainer):
    """As transformers' documentation shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class AddedLoss(ReRAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss, _ = add_retention_loss(outputs.loss, self.model)
        return (loss, outputs) if return_outputs else loss


def trained(folder, kind, loss):
    trainer = kind(
        fresh_bert(), arguments(folder), train_dataset=examples(), reram_config=ReRAMConfig(retention_loss=loss)
    )
    trainer.train()
    return trainer.model.classifier.weight.detach()


def test_a_compute_loss_of_ones_own_trains_with_drift(tmp_path):
    torch.testing.assert_close(trained(tmp_path, OwnLoss, "drift"), trained(tmp_path, ReRAMTrainer, "drift"))


@pytest.mark.parametrize("loss", ["output", "consistency"])
def test_a_compute_loss_that_loses_the_retention_loss_is_refused(tmp_path, loss):
    with pytest.raises(RuntimeError, match=r"OwnLoss\.compute_loss calls neither super\(\)\.compute_loss nor"):
        trained(tmp_path, OwnLoss, loss)


def test_a_compute_loss_may_add_the_retention_loss_itself(tmp_path):
    torch.testing.assert_close(trained(tmp_path, AddedLoss, "output"), trained(tmp_path, ReRAMTrainer, "output"))


class GuidedLoss(ReRAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, guide = model(**inputs), self.teacher(**inputs)
        return nn.functional.mse_loss(outputs.logits, guide.logits)


@pytest.mark.parametrize("kind", [OwnLoss, GuidedLoss])
def test_a_teacher_whom_a_compute_loss_does_not_ask_is_refused(tmp_path, kind):
    config = ReRAMConfig(retention_loss="none")
    trainer = kind(
        fresh_bert(), arguments(tmp_path), train_dataset=examples(), reram_config=config, teacher=fresh_bert(1)
    )
    if kind is GuidedLoss:
        trainer.train()
        return
    with pytest.raises(RuntimeError, match=r"OwnLoss\.compute_loss .* so that teacher= teaches nothing"):
        trainer.train()


class OwnStep(ReRAMTrainer):
    """As transformers' documentation shows it, with the model's own loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.own_loss(model.train(), self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()

    def own_loss(self, model, inputs):
        return model(**inputs).loss


class SampledStep(OwnStep):
    def own_loss(self, model, inputs):
        with self._sampled_drift():
            return super().own_loss(model, inputs)


class AddedStep(OwnStep):
    def own_loss(self, model, inputs):
        return add_retention_loss(super().own_loss(model, inputs), self.model)[0]


class ComputedStep(OwnStep):
    """As a copy of Trainer's own."""

    def own_loss(self, model, inputs):
        return self.compute_loss(model, inputs)


class LostStep(ComputedStep, OwnLoss):
    """Whose step calls a loss of its own."""


class WrappedStep:
    """No trainer, and before one."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class StrayStep:
    training_step, own_loss = OwnStep.__dict__["training_step"].__wrapped__, OwnStep.own_loss


@pytest.mark.parametrize("kind", [OwnStep, LostStep, type("Mixed", (StrayStep, ReRAMTrainer), {})])
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("drift", r"hf_reram\.sampled_drift, so that retention_loss='drift' samples"),
        ("noise", r"hf_reram\.sampled_drift, so that retention_loss='noise' samples"),
        ("output", r"hf_reram\.add_retention_loss, so that retention_loss='output' joins"),
        ("sensitivity+drift", r"hf_reram\.add_retention_loss, so that retention_loss='sensitivity\+drift' joins"),
        ("consistency", r"hf_reram\.add_retention_loss, so that retention_loss='consistency' joins"),
    ],
)
def test_a_training_step_that_loses_the_retention_is_refused(tmp_path, kind, loss, told):
    own = rf"{kind.__name__}\.training_step calls neither super\(\)\.training_step nor {told} no (drift|loss): call"
    with pytest.raises(RuntimeError, match=own):
        trained(tmp_path, kind, loss)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (OwnStep, "none"),
        (SampledStep, "drift"),
        (AddedStep, "output"),
        *((ComputedStep, loss) for loss in ("drift", "output", "sensitivity+drift", "consistency")),
        (type("Reaching", (WrappedStep, ReRAMTrainer), {}), "sensitivity+drift"),
    ],
)
def test_a_training_step_of_ones_own_may_do_all_that_ours_does(tmp_path, kind, loss):
    torch.testing.assert_close(trained(tmp_path, kind, loss), trained(tmp_path, ReRAMTrainer, loss))


class SkippingStep(ReRAMTrainer):
    """Leaves the batch of the first of three steps out."""

    left_out = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == self.left_out:
            return self.instead(model, inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def instead(self, model, inputs):
        return torch.tensor(0.0)


class LookingStep(SkippingStep):
    """Which has a look at the batch first."""

    def instead(self, model, inputs):
        with torch.no_grad():
            seen = model(**self._prepare_inputs(inputs)).loss, model.train()(**inputs).loss
        return 0 * torch.stack(seen).mean()


class SkippingLoss(OwnLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step == 0:
            return 0 * model.classifier.bias.sum()
        return ReRAMTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class StrayingStep(SkippingStep):
    """In the last of three steps a forward of its own, and one in evaluation after it."""

    left_out = 2

    def instead(self, model, inputs):
        inputs = self._prepare_inputs(inputs)
        loss = model.train()(**inputs).loss
        loss.backward()
        with torch.no_grad(), self._sampled_drift():
            model.eval()(**inputs)
        return loss.detach()


def steps_of(folder, kind, loss, **options):
    """How many steps of three a trainer has counted a task loss of."""
    args = arguments(folder, max_steps=3, logging_steps=3)
    config = ReRAMConfig(retention_loss=loss)
    trainer = kind(fresh_bert(), args, train_dataset=examples(), reram_config=config, **options)
    counted = []
    trainer._count = lambda name, value, weight=1.0: counted.append(trainer.state.global_step)
    trainer.train()
    return sorted(set(counted))


LOSSES = ("none", "drift", "output", "sensitivity+drift", "consistency")


@pytest.mark.parametrize("kind", [SkippingStep, LookingStep, SkippingLoss])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_that_leaves_its_batch_out_loses_nothing(tmp_path, kind, loss):
    assert steps_of(tmp_path, kind, loss) == [1, 2]


@pytest.mark.parametrize("kind", [SkippingStep, SkippingLoss])
def test_nor_does_a_teacher_where_no_forward_ran(tmp_path, kind):
    assert steps_of(tmp_path, kind, "none", teacher=fresh_bert(1)) == [1, 2]
    digitally = kind(
        fresh_bert(),
        arguments(tmp_path, max_steps=2),
        train_dataset=examples(),
        reram_config=ReRAMConfig(retention_loss="none"),
        teacher=fresh_bert(1),
    )
    digitally.train_digitally()
    assert digitally.state.global_step == 2


@pytest.mark.parametrize(
    ("loss", "told"),
    [("drift", "samples no drift"), ("output", "joins no loss"), ("consistency", "joins no loss")],
)
def test_a_later_step_that_loses_the_retention_is_refused_too(tmp_path, loss, told):
    with pytest.raises(RuntimeError, match=rf"StrayingStep\.training_step calls neither .*'{loss}' {told}"):
        steps_of(tmp_path, StrayingStep, loss)
    assert steps_of(tmp_path, StrayingStep, "none") == [0, 1]


def test_a_digital_step_without_its_teacher_is_refused(tmp_path):
    trainer = StrayingStep(
        fresh_bert(),
        arguments(tmp_path, max_steps=3),
        train_dataset=examples(),
        reram_config=ReRAMConfig(retention_loss="none"),
        teacher=fresh_bert(1),
    )
    with pytest.raises(RuntimeError, match=r"StrayingStep\.training_step .* so that teacher= teaches nothing"):
        trainer.train_digitally()
    assert trainer.state.global_step == 2


def test_a_training_step_of_ones_own_trains_digitally_and_loses_no_teacher_nor_nan(tmp_path):
    options = {"train_dataset": examples(), "reram_config": ReRAMConfig(retention_loss="none")}
    OwnStep(fresh_bert(), arguments(tmp_path), **options).train_digitally()
    with pytest.raises(RuntimeError, match=r"OwnStep\.training_step .* so that teacher= teaches nothing"):
        OwnStep(fresh_bert(), arguments(tmp_path), teacher=fresh_bert(1), **options).train()
    trainer = OwnStep(fresh_bert(), arguments(tmp_path), **options)
    trainer.model.classifier.bias.data[0] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"the loss of step 1 is nan: 'classifier\.bias' of the model holds NaN"
    ):
        trainer.train()


class Once(IterableDataset):
    """As a socket is one."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_data_that_can_be_read_once_are_not_lost_to_calibration(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset is a Once that can be read once.* give calibration_dataset="):
        trainer_of(tmp_path, data=Once(examples()))
    trainer = trainer_of(tmp_path, data=Once(examples()), calibration_dataset=Once(examples()))
    trainer.train()
    assert trainer.state.global_step == 4


class Anew(IterableDataset):
    """Its own iterator, which begins anew."""

    def __init__(self, rows):
        self.rows, self.at = list(rows), 0

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == len(self.rows):
            raise StopIteration
        self.at += 1
        return self.rows[self.at - 1]


def test_a_stream_that_is_its_own_iterator_and_begins_anew_is_calibrated_and_trained_on(tmp_path):
    trainer = trainer_of(tmp_path, data=Anew(examples()), arguments_={"max_steps": 2})
    assert all(layer.calibrated for layer in crossbar_layers(trainer.model).values())
    trainer.train()
    assert trainer.state.global_step == 2


def test_resuming_a_training_that_is_over_warns_of_nothing(tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, arguments_=saved).train()
    with caplog.at_level("WARNING", "hf_reram"):
        trainer_of(tmp_path, arguments_=saved).train(resume_from_checkpoint=True)
    assert "not called" not in caplog.text


def test_weights_that_are_loaded_before_the_training_are_calibrated_for(tmp_path):
    trainer = trainer_of(tmp_path, arguments_={"learning_rate": 0.0})
    weights = {k: 3 * v if v.dim() == 2 else v for k, v in models.tiny_bert(num_hidden_layers=1).state_dict().items()}
    trainer.model.load_state_dict(weights, strict=False)
    before = trainer.model.classifier.weight.clone()
    trainer.train()
    cut = (trainer.model.classifier.weight != before).float().mean()
    assert cut < 0.2  # about what a calibration clips by choice; more than half lay beyond


def test_each_trial_has_the_config_that_it_patches_with(tmp_path):
    weights = iter([0.1, 0.2])

    def init():
        model = patch_model(fresh_bert(), ReRAMConfig(retention_loss="output", retention_weight=next(weights)))
        return calibrate(model, [bert_batch()])

    trainer = ReRAMTrainer(None, arguments(tmp_path, max_steps=1), train_dataset=examples(), model_init=init)
    assert trainer.reram_config.retention_weight == 0.1
    trainer.train()
    assert trainer.reram_config.retention_weight == 0.2


@pytest.mark.parametrize("named", [True, False])
def test_streamed_data_calibrate(tmp_path, named):
    rows = [{key: value.tolist() for key, value in row.items()} | {"text": "unused"} for row in examples()]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    if not named:
        stream = stream.map(lambda row: row)  # of whose columns nothing is known
    trainer = trainer_of(tmp_path, data=stream, arguments_={"max_steps": 2})
    assert all(layer.calibrated for layer in crossbar_layers(trainer.model).values())
    trainer.train()


def test_several_evaluation_sets_have_their_metrics_each(tmp_path):
    sets = {"easy": examples(8), "hard": examples(16)}
    still = device(read_noise=0.0)  # what is read first draws nothing from what is read next
    trainer = trainer_of(tmp_path, ReRAMConfig(device=still), eval_dataset=sets, compute_metrics=accuracy)
    report = trainer.evaluate_robustness(["1d"], seeds=2, progress=False)
    assert {"easy_accuracy", "hard_accuracy", "easy_loss", "hard_loss"} <= set(report.metrics)
    alone = trainer.evaluate_robustness(["1d"], seeds=2, eval_dataset=sets["hard"], progress=False)
    for chip, other in zip(report.measurements, alone.measurements, strict=True):
        assert chip.metrics["hard_accuracy"] == other.metrics["accuracy"]
        assert chip.metrics["hard_loss"] == other.metrics["loss"] != chip.metrics["easy_loss"]


def test_workers_that_persist_read_the_data_that_is_asked_for(tmp_path):
    """The trainer keeps loaders of all data sets that it is given without a name as one."""
    sets, other = {"easy": examples(8), "hard": examples(16)}, examples(12)
    options = {"model": fresh_bert().eval(), "compute_metrics": accuracy, "eval_dataset": examples(24)}
    reram = ReRAMConfig(device=device(read_noise=0.0))
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    plain = trainer_of(tmp_path, reram, **options)
    kept = trainer_of(tmp_path, reram, **{**options, "model": copy.deepcopy(fresh_bert().eval())}, arguments_=workers)
    asked = {"times": ["1d"], "seeds": 1, "progress": False}
    losses = {name: plain.evaluate(data)["eval_loss"] for name, data in {**sets, "other": other, "own": None}.items()}
    assert len(set(losses.values())) == 4

    assert kept.evaluate()["eval_loss"] == losses["own"]
    found = kept.evaluate_robustness(eval_dataset=sets, **asked)
    assert found.measurements == plain.evaluate_robustness(eval_dataset=sets, **asked).measurements
    found = kept.evaluate_robustness(eval_dataset=other, **asked)
    assert found.measurements == plain.evaluate_robustness(eval_dataset=other, **asked).measurements
    assert kept.evaluate(other)["eval_loss"] == losses["other"]
    assert kept.evaluate()["eval_loss"] == losses["own"]
    kept.eval_dataset = sets
    assert kept.evaluate()["eval_hard_loss"] == losses["hard"]
    sets["hard"] = other
    assert kept.evaluate()["eval_hard_loss"] == losses["other"]
    loader = kept.get_eval_dataloader("hard")
    assert kept.get_eval_dataloader("hard") is loader  # whose workers go on
    kept._eval_dataloaders.clear()  # and end, or they would hold on to what other tests wait for
    del loader
    gc.collect()


def test_a_dataset_dict_is_several_data_sets(tmp_path):
    part = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples(8)])
    trainer = trainer_of(tmp_path, ReRAMConfig(device=device(read_noise=0.0)), compute_metrics=accuracy)
    found = trainer.evaluate_robustness(
        ["1d"], seeds=1, progress=False, eval_dataset=DatasetDict(a=part, b=part.select(range(4)))
    )
    assert {"a_accuracy", "b_accuracy", "a_loss", "b_loss"} <= set(found.metrics)
    alone = trainer.evaluate_robustness(["1d"], seeds=1, progress=False, eval_dataset=part.select(range(4)))
    assert found.digital["b_loss"] == alone.digital["loss"] != found.digital["a_loss"]


def test_a_chip_without_a_figure_is_left_out_of_the_mean_of_an_evaluation(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.evaluation.trainer"), "propagate", True)
    calls = []

    def metrics(prediction):
        calls.append(1)
        run = len(calls)  # the ideal crossbar, then chips 0 to 3
        return {"x": float("nan") if run == 3 else float(run), **({"y": 7.0 * run} if run in (1, 5) else {})}

    trainer = trainer_of(
        tmp_path, eval_dataset=examples(8), compute_metrics=metrics, eval_times=["1d", "24h"], eval_chips=np.int64(4)
    )
    found = trainer.evaluate()
    assert len(calls) == 5
    assert found["eval_1d_x"] == (2 + 4 + 5) / 3 and found["eval_1d_y"] == 35.0
    told = [record.getMessage() for record in caplog.records]
    assert "eval_1d_x is not finite or missing on 1 of 4 chips: its mean is over the others" in told
    assert "eval_1d_y is not finite or missing on 3 of 4 chips: its mean is over the others" in told


def test_a_resumed_evaluation_knows_its_data(tmp_path):
    trainer = trainer_of(tmp_path)
    options = {"times": ["1d"], "seeds": 1, "progress": False, "resume": tmp_path / "log.jsonl"}
    first = trainer.evaluate_robustness(eval_dataset=examples(8), **options)
    assert trainer.evaluate_robustness(eval_dataset=examples(8), **options).measurements == first.measurements
    with pytest.raises(ValueError, match="another evaluation"):
        trainer.evaluate_robustness(eval_dataset=examples(16), **options)


def ones(rows):
    return {"input_ids": [[1] * 6 for _ in rows["input_ids"]], "labels": rows["labels"]}


def twos(rows):
    return {"input_ids": [[2] * 6 for _ in rows["input_ids"]], "labels": rows["labels"]}


def cut(rows):
    return {key: value[:, :3] if value.dim() > 1 else value for key, value in default_data_collator(rows).items()}


class Smoothed(ReRAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss * 2, outputs) if return_outputs else loss * 2


def test_a_report_says_that_it_was_measured_under_autocast(tmp_path):
    """Which accelerate puts around a model once, for the first Trainer that it is given to."""
    data, options = examples(8), {"seeds": 1, "progress": False, "resume": tmp_path / "log.jsonl"}
    model = fresh_bert()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    calibrate(patch_model(model, ReRAMConfig(retention_loss="none")), [bert_batch()])
    with digital(model.eval()), torch.no_grad():
        plain = float(model(**default_data_collator(data)).loss)
        with torch.autocast("cpu", torch.bfloat16):
            cast = float(model(**default_data_collator(data)).loss)
    assert abs(plain - cast) > 1e-5
    for other, order in ((copy.deepcopy(model), (True, False)), (copy.deepcopy(model), (False, True))):
        for bf16 in order:
            trainer = ReRAMTrainer(other, arguments(tmp_path, bf16=bf16), eval_dataset=data)
            for _ in range(2):  # of the log, too
                report = trainer.evaluate_robustness(["1d"], **options)
                assert report.digital["loss"] == pytest.approx(cast if order[0] else plain, rel=1e-6)
                assert ("evaluated under autocast to bfloat16" in report.notes) == order[0]
            (tmp_path / "log.jsonl").unlink()


@dataclass
class Factored(TrainingArguments):
    loss_factor: float = 1.0


CFG = SimpleNamespace(threshold=0.5)


def counted(prediction):
    return {"share": float((prediction.predictions.max(-1) > CFG.threshold).mean())}


class Weighted(ReRAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], self.class_weights)
        return (self.args.loss_factor * loss, outputs) if return_outputs else self.args.loss_factor * loss


def test_a_resumed_evaluation_knows_what_it_evaluates_with(tmp_path):
    """Of what changes a figure but no weight, each is another evaluation."""
    model = patch_model(fresh_bert(), ReRAMConfig())
    calibrate(model, [bert_batch()])
    data = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples(8)])
    options = {"times": ["1d"], "seeds": 1, "progress": False, "references": False}

    def run(kind=ReRAMTrainer, eval_dataset=data, arguments_=None, resume="log.jsonl", **parts):
        parts = {"compute_metrics": accuracy, **parts}
        args = arguments(tmp_path, **{"remove_unused_columns": False, **(arguments_ or {})})
        trainer = kind(model, args, train_dataset=examples(), eval_dataset=eval_dataset, **parts)
        return trainer.evaluate_robustness(resume=tmp_path / resume, **options)

    first = run()
    assert run().measurements == first.measurements
    for part, change in (
        ("compute_metrics", {"compute_metrics": lambda p: {"accuracy": 1 - accuracy(p)["accuracy"]}}),
        ("preprocess_logits_for_metrics", {"preprocess_logits_for_metrics": lambda logits, labels: -logits}),
        ("data_collator", {"data_collator": cut}),
        (None, {"eval_dataset": data.with_transform(ones)}),
        ("args.bf16_full_eval", {"arguments_": {"bf16_full_eval": True}}),
        ("args.label_smoothing_factor", {"arguments_": {"label_smoothing_factor": 0.5}}),
        ("args.per_device_eval_batch_size", {"arguments_": {"per_device_eval_batch_size": 4}}),
        ("class", {"kind": Smoothed}),
    ):
        named = "'data'" if part is None else f"'trainer', 'trainer.{part}'"
        with pytest.raises(ValueError, match=rf"another evaluation \(what differs: {named}\)"):
            run(**change)
    factored = Factored(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False)
    numbers: list[tuple[float, float]] = []

    def own(resume, weights=1.0, factor=1.0, threshold=0.5):
        factored.loss_factor, CFG.threshold = factor, threshold
        trainer = Weighted(model, factored, train_dataset=examples(), eval_dataset=data, compute_metrics=counted)
        trainer.class_weights = torch.tensor([weights, 1.0, 1.0])
        found = trainer.evaluate_robustness(resume=tmp_path / resume, **options).measurements[0].metrics
        numbers.append((found["loss"], found["share"]))

    own("own.jsonl")
    own("own.jsonl")
    assert numbers[0] == numbers[1]
    for part, change in {
        "class_weights": {"weights": 5.0},
        "args.loss_factor": {"factor": 3.0},
        "compute_metrics": {"threshold": 0.0},
    }.items():
        with pytest.raises(ValueError, match=rf"another evaluation \(what differs: 'trainer', 'trainer\.{part}'\)"):
            own("own.jsonl", **change)
        own("other.jsonl", **change)
        (tmp_path / "other.jsonl").unlink()
    assert len({loss for loss, _ in numbers[1:4]}) == 3 and numbers[4][0] == numbers[0][0]
    assert numbers[3][0] == pytest.approx(3 * numbers[0][0], rel=1e-5) and numbers[4][1] == 1 > numbers[0][1]
    run(eval_dataset=data.with_transform(ones), resume="ones.jsonl")
    with pytest.raises(ValueError, match="another evaluation"):
        run(eval_dataset=data.with_transform(twos), resume="ones.jsonl")
    lock = threading.Lock()
    with pytest.raises(ValueError, match="the trainer cannot be told from another one: say with key="):
        run(compute_metrics=lambda p: {"locked": lock.locked()}, resume="other.jsonl")


class Recording(ReRAMTrainer):
    """Keeps what nothing reads, and ``kept`` where a metric is counted."""

    last_loss = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.started = time.time()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.last_loss = loss.item()
        return loss


class Keeping(Recording):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.best = min(getattr(self, "best", 1e9), loss.item())
        return loss


@dataclass
class Chips(TrainingArguments):
    chips: int = 1
    log_file: str = "a"


def test_a_killed_script_is_resumed_whatever_its_trainer_only_writes(tmp_path):
    data = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples(8)])

    def run(kind, log, **changed):
        saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, **changed}
        plain = arguments(tmp_path / kind.__name__, **saved, kind=Chips)
        trainer = kind(fresh_bert(), plain, train_dataset=data, eval_dataset=data, reram_config=ReRAMConfig())
        trainer.train(resume_from_checkpoint=bool(changed) or None)
        seeds = plain.chips
        return trainer.evaluate_robustness(["1d"], seeds=seeds, progress=False, resume=tmp_path / log).measurements

    first = run(Recording, "log.jsonl")
    again = run(Recording, "log.jsonl", chips=2, log_file="b")
    assert again[:1] == first and len(again) == 2
    run(Keeping, "kept.jsonl")
    with pytest.raises(ValueError, match=r"what differs: 'trainer', 'trainer\.best'\)"):
        run(Keeping, "kept.jsonl", chips=2)


def test_an_evaluation_by_a_plain_trainer_is_told_before_and_after_its_training(tmp_path):
    data = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples(8)])
    model = calibrate(patch_model(fresh_bert(), ReRAMConfig()), [bert_batch()])
    options = {"times": ["1d"], "progress": False, "resume": tmp_path / "log.jsonl"}

    def run(seeds, eval_dataset=data, trained=True):
        args = arguments(tmp_path, max_steps=2)
        trainer = Trainer(fresh_bert(), args, train_dataset=data, compute_metrics=accuracy)
        if trained:
            trainer.train()
        trainer.model, trainer.eval_dataset = model, eval_dataset

        def evaluate(model):
            return trainer.evaluate()["eval_loss"]

        return [evaluate_robustness(model, evaluate, seeds=n, **options).measurements for n in seeds]

    one, two = run([1, 2])
    assert two[:1] == one and run([2], trained=False) == [two]
    with pytest.raises(ValueError, match=r"what differs: .*'evaluation\.trainer\.eval_dataset'"):
        run([2], data.select(range(4)))


def test_a_saved_model_has_its_report_beside_it(tmp_path):
    trainer = trainer_of(tmp_path)
    report = trainer.evaluate_robustness(["1d"], seeds=1, eval_dataset=examples(8), progress=False)
    trainer.save_model(str(tmp_path / "model"))
    assert RobustnessReport.from_json(tmp_path / "model" / "robustness.json").measurements == report.measurements
    prepare(tmp_path / "model", trainer.model)
    comparison = tmp_path / "model" / "comparison.json"
    comparison.write_text(json.dumps({"ours": report.to_dict()}))
    trainer.save_model(str(tmp_path / "model"))
    written = {"robustness.json", "robustness.png", "comparison.json"}
    assert written <= {file.name for file in (tmp_path / "model").iterdir()}
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (tmp_path / "other" / "robustness.json").write_text('{"mine": 1}')
    trainer.train()
    for folder in ("later", "model", "other"):
        trainer.save_model(str(tmp_path / folder))
    assert not (tmp_path / "later" / "robustness.json").exists()
    assert written.isdisjoint(file.name for file in (tmp_path / "model").iterdir())
    assert "chip" not in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "other" / "robustness.json").read_text() == '{"mine": 1}'  # which is no report of ours
    # What the plot is of the comparison says.
    assert {"robustness.png", "comparison.json"}.isdisjoint(file.name for file in (tmp_path / "other").iterdir())


def test_another_loss_keeps_the_calibration_of_a_model_without_training_data(tmp_path):
    model = patch_model(fresh_bert(), ReRAMConfig(retention_loss="output"))
    calibrate(model, [bert_batch()])
    trainer = ReRAMTrainer(model, arguments(tmp_path), reram_config=ReRAMConfig(retention_loss="drift"))
    assert all(layer.calibrated for layer in crossbar_layers(trainer.model).values())
    assert trainer.reram_config.retention_loss == "drift"


def test_the_same_layers_in_other_words_keep_their_calibration(tmp_path):
    model = calibrate(patch_model(fresh_bert(), ReRAMConfig()), [bert_batch()])
    ranges = {name: float(layer.input_range) for name, layer in crossbar_layers(model).items()}
    for words in ({"target_modules": "all-linear"}, {"target_modules": ".*"}, {"target_modules": sorted(ranges)}):
        trainer = ReRAMTrainer(model, arguments(tmp_path), reram_config=ReRAMConfig(**words))
        assert {name: float(layer.input_range) for name, layer in crossbar_layers(trainer.model).items()} == ranges
    fewer = ReRAMTrainer(model, arguments(tmp_path), reram_config=ReRAMConfig(modules_to_not_convert=["classifier"]))
    layers = crossbar_layers(fewer.model)
    assert set(layers) == set(ranges) - {"classifier"} and not any(layer.calibrated for layer in layers.values())


def test_resuming_with_the_same_layers_in_other_words(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, arguments_=saved).train()
    words = ReRAMConfig(retention_loss="output", target_modules="all-linear")
    trainer_of(tmp_path, words, arguments_=saved).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("missing", ["config.json", CONFIGS])
def test_resuming_on_other_hardware_is_refused(tmp_path, missing):
    """Also from shards (FSDP2), which have no config.json, and from what older versions saved."""
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, arguments_=saved).train()
    (tmp_path / "checkpoint-4" / missing).unlink()
    other = trainer_of(tmp_path, ReRAMConfig(retention_loss="output", weight_clip=None), arguments_=saved)
    with pytest.raises(ValueError, match="calibrated with another weight_clip: resume with the same ReRAMConfig"):
        other.train(resume_from_checkpoint=True)
    trainer_of(tmp_path, ReRAMConfig(retention_loss="drift"), arguments_=saved).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("text", ["{}", "[1]", "[{}", '[{"device": "none"}]'])
def test_what_a_checkpoint_says_of_its_hardware_is_checked(tmp_path, text):
    (tmp_path / CONFIGS).write_text(text)
    with pytest.raises(ValueError, match=r"hf_reram.json|device"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path))


def test_labels_that_are_all_ignored_say_nothing_of_a_models_loss(tmp_path):
    first = [{**row, "labels": torch.tensor(-100)} for row in examples(8)]
    trainer = trainer_of(tmp_path, data=first + examples(24), arguments_={"gradient_accumulation_steps": 2})
    batch = {key: torch.stack([row[key] for row in first]) for key in first[0]}
    trainer.model.train()
    trainer._look_at_loss(trainer.model, batch, torch.tensor(8))
    assert not trainer._looked_at_loss and trainer.model.training


@pytest.mark.parametrize("kind", [ReRAMTrainer, OwnLoss])
def test_frozen_batch_norm_stays_so_with_accumulated_batches(tmp_path, kind):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x, labels=None, **kwargs):
            logits = self.last(self.norm(self.first(x)))
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    data = [{"x": torch.randn(6), "labels": torch.tensor(i % 3)} for i in range(32)]
    trainer = kind(
        Normed(),
        arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2),
        train_dataset=data,
        reram_config=ReRAMConfig(),
        freeze_batch_norm=True,
    )
    before = trainer.model.norm.running_mean.clone()
    trainer.train()
    assert torch.equal(trainer.model.norm.running_mean, before)


def test_a_teacher_is_another_model(tmp_path):
    model = fresh_bert()
    with pytest.raises(ValueError, match="teacher is the model that is trained"):
        trainer_of(tmp_path, model=model, teacher=model)


def test_a_teacher_has_its_own_modules_and_trained_parameters(tmp_path):
    model, teacher = fresh_bert(), fresh_bert(1)
    teacher.bert = model.bert
    with pytest.raises(ValueError, match=r"teacher shares \d+ modules .*bert\.embeddings\.word_embeddings"):
        trainer_of(tmp_path, model=model, teacher=teacher)
    assert not crossbar_layers(model) and all(p.requires_grad for p in model.parameters())
    teacher = fresh_bert(1)
    teacher.bert.embeddings.word_embeddings.weight = model.bert.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match=r"shares 1 .*\(bert\.embeddings\.word_embeddings\.weight\): allowed"):
        trainer_of(tmp_path, model=model, teacher=teacher)
    model.bert.embeddings.requires_grad_(False)
    trainer_of(tmp_path, model=model, teacher=teacher)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_half_precision_leaves_the_weights_that_were_trained(tmp_path, name):
    options = {name: True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        tmp_path,
        eval_dataset=examples(),
        eval_times=["1d"],
        eval_chips=2,
        arguments_={**options, "load_best_model_at_end": True},
    )
    trainer.train()
    trained = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    trainer.predict(examples())
    report = trainer.evaluate_robustness(["1d"], seeds=2)
    assert any(name[:2] in note.replace("bfloat", "bf").replace("float", "fp") for note in report.notes)
    assert abs(report.statistic("loss", "1d").mean - metrics["eval_1d_loss"]) < 0.05
    assert report.ideal["loss"] == pytest.approx(metrics["eval_loss"], abs=1e-2)
    trainer.save_model(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    for found in (trainer.model.state_dict(), again.state_dict()):
        assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in trained.items())
    assert report_of(again) is not None  # of the weights that are saved
    assert all(layer.chip is None for layer in crossbar_layers(trainer.model).values())


def test_an_evaluation_in_half_precision_is_one(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=examples(), arguments_={"bf16_full_eval": True})
    seen = []
    trainer.model.classifier.register_forward_hook(lambda layer, args, y: seen.append(y.dtype))
    trainer.evaluate()
    trainer.evaluate_robustness(["1d"], seeds=1)
    assert set(seen) == {torch.bfloat16}
