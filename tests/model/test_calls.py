"""A crossbar counts its calls; one that never ran is no chip."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    RobustnessReport,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    evaluate_robustness,
    inspect_layers,
    patch_model,
    unpatch_model,
)
from hf_reram.hub.about import about_model
from hf_reram.hub.card import model_card
from tests.samples.models import bert_batch


class Bypassed(nn.Module):
    """Reads the weight of one layer past it."""

    def __init__(self):
        super().__init__()
        self.first, self.past, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = nn.functional.linear(self.first(x), self.past.weight, self.past.bias)
        return self.last(x)


@pytest.fixture
def bypassed():
    model = Bypassed().eval()
    patch_model(model, ReRAMConfig())
    return calibrate(model, [torch.randn(16, 6)])


def score(model) -> float:
    with torch.no_grad():
        return float(model(torch.ones(4, 6)).mean())


def test_calls_are_counted(bypassed):
    for layer in crossbar_layers(bypassed).values():
        layer.calls = 0
    for _ in range(3):
        score(bypassed)
    assert {name: layer.calls for name, layer in crossbar_layers(bypassed).items()} == {
        "first": 3,
        "past": 0,
        "last": 3,
    }


def test_a_report_is_refused_where_a_layer_never_ran(bypassed, tmp_path):
    with pytest.raises(RuntimeError, match=r"1 of 3 crossbar layers were not called in an evaluation.*: past"):
        evaluate_robustness(bypassed, score, ["1d"], seeds=2, progress=False)
    log = tmp_path / "chips.jsonl"
    report = evaluate_robustness(
        bypassed, score, ["1d"], seeds=2, progress=False, allow_uncalled=True, resume=log, references=False
    )
    assert report.uncalled == ["past"]
    assert "not called, and so were no chip: past" in report.to_markdown()
    assert RobustnessReport.from_dict(report.to_dict()).uncalled == ["past"]
    report.about = about_model(bypassed, report, metric="metric").to_dict()
    assert "were not called, and so were no chip: past" in str(model_card(report))
    # What was kept in a file is not forgotten either.
    again = evaluate_robustness(
        bypassed, score, ["1d"], seeds=2, progress=False, allow_uncalled=True, resume=log, references=False
    )
    assert again.uncalled == ["past"]
    with pytest.raises(RuntimeError, match="past"):
        evaluate_robustness(bypassed, score, ["1d"], seeds=2, progress=False, resume=log, references=False)


def test_an_evaluation_that_calls_another_model_is_refused(tiny_bert):
    other = copy.deepcopy(tiny_bert)
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    with pytest.raises(RuntimeError, match="14 of 14 crossbar layers were not called"):
        evaluate_robustness(tiny_bert, lambda m: float(other(**bert_batch()).loss), ["1d"], seeds=1, progress=False)


def test_deploy_and_inspect_warn_once_with_the_names(bypassed, caplog):
    with caplog.at_level("WARNING", "hf_reram"):
        for seed in range(3):
            with deploy(bypassed, "1d", seed=seed):
                score(bypassed)
        with deploy(bypassed, "1d"):
            pass  # nothing ran, so nothing was bypassed
        layers = inspect_layers(bypassed, "1d", batches=[torch.randn(4, 6)])
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 3 and all(message.endswith(": past") for message in found)
    assert sum("are not calibrated" in message for message in found) == 1
    assert {layer.name: layer.noise_to_signal is None for layer in layers} == {
        "first": False,
        "last": False,
        "past": True,
    }
    assert layers[-1].name == "past"


def test_calibration_names_them(caplog):
    model = Bypassed().eval()
    patch_model(model, ReRAMConfig())
    with caplog.at_level("WARNING", "hf_reram"):
        calibrate(model, [torch.randn(16, 6)])
        calibrate(model, [torch.randn(16, 6)])
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 1 and found[0].endswith(": past")
    assert not crossbar_layers(model)["past"].calibrated


class Supervised(Bypassed):
    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_the_trainer_warns_once_with_the_names(tmp_path, caplog):
    rows = [{"x": torch.randn(6), "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no"
    )
    with caplog.at_level("WARNING", "hf_reram"):
        ReRAMTrainer(model=Supervised(), args=arguments, train_dataset=rows, reram_config=ReRAMConfig()).train()
    found = [r.getMessage() for r in caplog.records if "training" in r.getMessage()]
    assert found == ["1 of 3 crossbar layers were not called in training: past"]
    caplog.clear()
    with caplog.at_level("WARNING", "hf_reram"), pytest.raises(RuntimeError, match="past"):
        trainer = ReRAMTrainer(
            model=Supervised(), args=arguments, train_dataset=rows, eval_dataset=rows, reram_config=ReRAMConfig()
        )
        trainer.evaluate_robustness(["1d"], seeds=1, progress=False)


def test_compiled_layers_know_that_they_ran(bypassed):
    call = torch.compile(bypassed, backend="eager", fullgraph=True)
    for _ in range(2):
        for layer in crossbar_layers(bypassed).values():
            layer.calls = 0
        score(call)
        assert [layer.calls for layer in crossbar_layers(bypassed).values()] == [1, 0, 1]


def test_a_digital_model_or_a_chip_is_not_evaluated_as_a_chip(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])

    def loss(model):
        return float(model(**bert_batch()).loss)

    with digital(tiny_bert):
        copied = copy.deepcopy(tiny_bert)
        with pytest.raises(ValueError, match="digital here"):
            evaluate_robustness(tiny_bert, loss, ["10y"], seeds=1, progress=False)
        with pytest.raises(ValueError, match="digital here"), deploy(tiny_bert, "10y"):
            pass
    with deploy(tiny_bert, "10y"), pytest.raises(ValueError, match="deployed as a chip here"):
        evaluate_robustness(tiny_bert, loss, ["10y"], seeds=1, progress=False)
    report = evaluate_robustness(copied, loss, ["10y"], seeds=2, progress=False)
    assert all(m.metrics["metric"] != report.digital["metric"] for m in report.measurements)


@pytest.mark.parametrize("seeds", [True, 2.5, "2", [-1], [0.5], None])
def test_bad_chips_are_refused_before_anything_runs(bypassed, seeds):
    with pytest.raises(ValueError, match="seeds="):
        evaluate_robustness(bypassed, lambda model: pytest.fail("ran"), ["1d"], seeds=seeds, progress=False)


def whole() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    return calibrate(patch_model(model, ReRAMConfig()), [torch.randn(16, 6)])


def test_digital_calls_are_none_of_a_chip():
    model = whole()

    def digitally(model):
        with digital(model):
            return score(model)

    for references in (False, True):
        with pytest.raises(RuntimeError, match="not on their cells"):
            evaluate_robustness(model, digitally, ["1d"], seeds=1, references=references, progress=False)

    def both(model):
        return score(model) - digitally(model)

    report = evaluate_robustness(model, both, ["10y"], seeds=1, progress=False)
    assert report.digital == {"metric": 0.0} and report.measurements[0].metrics["metric"] != 0.0


def test_an_evaluation_that_deploys_is_refused():
    def elsewhere(model):
        with deploy(model, "1s", seed=77):
            return score(model)

    with pytest.raises(RuntimeError, match="a chip of its own"):
        evaluate_robustness(whole(), elsewhere, ["10y"], seeds=1, references=False, progress=False)


def test_a_layer_that_was_replaced_is_named():
    model = whole()
    model[1] = nn.Linear(6, 2)
    with pytest.raises(RuntimeError, match=r"1 of 2 crossbar layers .*: 1\. Keep"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False)
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, allow_uncalled=True)
    assert report.uncalled == ["1"]
    unpatched = whole()
    unpatch_model(unpatched[1])  # which is no replacement
    assert evaluate_robustness(unpatched, score, ["1d"], seeds=1, progress=False).uncalled == []
    part = model[:1]  # by itself it lacks nothing
    assert evaluate_robustness(part, score, ["1d"], seeds=1, progress=False).uncalled == []


def test_each_model_is_warned_of(caplog):
    for _ in range(2):
        model = Bypassed().eval()
        patch_model(model, ReRAMConfig())
        with deploy(model, "1d"):
            score(model)
    assert [record.message.endswith(": past") for record in caplog.records].count(True) == 2
