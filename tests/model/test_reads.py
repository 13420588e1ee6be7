"""What a model computes with its crossbars' weights itself, beside their cells, a report says."""

import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_reram import (
    DeviceConfig,
    ReRAMConfig,
    ReRAMTrainer,
    calibrate,
    deploy,
    digital,
    evaluate_robustness,
    patch_model,
    reconfigure,
)
from tests.samples.models import bert_batch, tiny_bert

OPTIONS = {"times": ["1d"], "seeds": 2, "progress": False}


class Reading(nn.Module):
    """``self.b`` runs on its cells, and something is made of its weight beside it."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.read = nn.Linear(8, 8), nn.Linear(8, 8), read

    def forward(self, x):
        return self.b(self.a(x)) + self.read(self, x)


QUIET = dataclasses.replace(DeviceConfig.from_preset("hfox-neurram"), read_noise=0.0)  # which is drawn in each forward


def patched(model, *batches):
    return calibrate(patch_model(model.eval(), ReRAMConfig(QUIET)), list(batches))


def score(model, x):
    with torch.no_grad():
        return float(model(x).square().sum())


def about_reads(report):
    return [note for note in report.notes if "computed with beside their cells" in note]


READS = {
    "linear": lambda model, x: F.linear(x, model.b.weight, model.b.bias),
    "matmul": lambda model, x: x @ model.b.weight.T,
    "einsum": lambda model, x: torch.einsum("ni,oi->no", x, model.b.weight),
    "matmul of a copy": lambda model, x: (model.state_dict()["b.weight"].to(torch.float64) @ x.double().mT).mT.float(),
    "numpy": lambda model, x: torch.from_numpy(x.numpy() @ model.b.weight.data.numpy().T),
    "norm": lambda model, x: x / model.b.weight.norm(),
    "stack": lambda model, x: x @ torch.stack([model.b.weight])[0],
}


@pytest.mark.parametrize("way", READS)
def test_a_weight_that_is_read_beside_its_layer_is_named(way, tmp_path):
    x = torch.randn(16, 8)
    model = patched(Reading(READS[way]), x)

    def evaluate(model):
        return score(model, x)

    for _ in range(2):  # the second one is read from the log
        report = evaluate_robustness(model, evaluate, resume=tmp_path / "log", **OPTIONS)
        (note,) = about_reads(report)
        assert note.endswith(f"which is digital: b ({way.split()[0]})") and report.uncalled == []


ASKS = {
    "kind": lambda model, x: x.to(model.b.weight.dtype).to(model.b.weight.device),
    "as": lambda model, x: x.to(model.b.weight).type_as(model.b.weight) + torch.zeros_like(model.b.weight)[0],
    "norms": lambda model, x: x + sum(p.norm().item() for p in model.parameters()) * 0,
    "saved": lambda model, x: x * len(copy.deepcopy(model).state_dict()),
    "moved": lambda model, x: model.to("cpu", torch.float64).to(torch.float32) and x,
}


@pytest.mark.parametrize("way", ASKS)
def test_what_asks_a_weight_for_its_kind_or_moves_it_is_no_such_read(way):
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def evaluate(model):
        return score(model, x) + float(ASKS[way](model, x).sum())

    assert about_reads(evaluate_robustness(model, evaluate, **OPTIONS)) == []


def test_a_trainer_that_moves_its_model_reads_no_weight(tmp_path):
    batch = bert_batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = ReRAMTrainer(patched(tiny_bert(), batch), args, eval_dataset=rows)
    report = trainer.evaluate_robustness(["1d"], seeds=1, references=False, progress=False)
    assert about_reads(report) == []
    model = patched(tiny_bert(), batch)

    def evaluate(model):
        return Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]

    assert about_reads(evaluate_robustness(model, evaluate, key="loss", **OPTIONS)) == []


def test_a_head_that_is_used_by_itself_is_such_a_read():
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def evaluate(model):
        return score(model, x) + float(F.linear(x, model.b.weight).sum())

    (note,) = about_reads(evaluate_robustness(model, evaluate, **OPTIONS))
    assert note.endswith(": b (linear)")


OUTSIDE = {
    "linear": lambda x, w: F.linear(x, F.normalize(w)),
    "matmul": lambda x, w: x @ (w * 2).T,
    "mm": lambda x, w: x.mm((w - w.mean()) / w.std()),
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w @ w.T),
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_what_is_made_of_a_weight_first_is_such_a_read_too(way):
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def evaluate(model):
        return score(model, x) + float(OUTSIDE[way](x, model.b.weight.detach()).sum())

    (note,) = about_reads(evaluate_robustness(model, evaluate, **OPTIONS))
    assert note.endswith(f": b ({way})")


FIGURES = {
    "power": lambda x, w: (w @ w.T).trace(),
    "norm": lambda x, w: w.norm() * x.sum(),
    "both": lambda x, w: (w.T @ w).sum() + torch.linalg.matrix_norm(w / 2),
}


@pytest.mark.parametrize("way", FIGURES)
def test_a_figure_of_a_weight_by_itself_is_no_such_read(way):
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def evaluate(model):
        return score(model, x) + float(FIGURES[way](x, model.b.weight.detach()))

    assert about_reads(evaluate_robustness(model, evaluate, **OPTIONS)) == []


def test_parts_that_are_deployed_within_one_another_are_chips(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.model.deploy"), "propagate", True)
    batch = bert_batch()
    model = patched(tiny_bert(), batch)
    with deploy(model.bert, "1d", seed=1), deploy(model.classifier, "10y", seed=2), torch.no_grad():
        model(**batch)
    assert not [record for record in caplog.records if "around the model" in record.getMessage()]


def test_a_comparison_with_the_digital_layers_is_no_such_read():
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def compared(model):
        with digital(model):
            before = score(model, x)
        return score(model, x) - before

    report = evaluate_robustness(model, compared, references=False, **OPTIONS)
    assert about_reads(report) == [] and "evaluate ran the model digitally too" in " ".join(report.notes)


def test_adapters_and_compiled_models_read_no_weight(monkeypatch):
    batch = bert_batch()
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    model = patched(model, batch)

    def evaluate(model):
        with torch.no_grad():
            return float(model(**batch).logits.sum())

    report = evaluate_robustness(model, evaluate, **OPTIONS)
    assert about_reads(report) == [] and "digitally too" not in " ".join(report.notes)
    x = torch.randn(16, 8)
    plain = patched(Reading(lambda model, x: x), x)
    fast = torch.compile(plain, backend="eager", fullgraph=True)  # of which nothing tells the model that is evaluated
    wanted = evaluate_robustness(plain, lambda model: score(model, x), references=False, **OPTIONS)
    report = evaluate_robustness(plain, lambda model: score(fast, x), references=False, **OPTIONS)
    for mine, theirs in zip(report.measurements, wanted.measurements):
        assert mine.metrics["metric"] == pytest.approx(theirs.metrics["metric"], rel=1e-5)


def test_layers_around_the_model_that_is_evaluated_are_no_chip(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.model.deploy"), "propagate", True)
    batch = bert_batch()
    model = patched(tiny_bert(), batch)

    def evaluate(_):
        with torch.no_grad():
            return float(model(**batch).logits.sum())

    with pytest.raises(RuntimeError, match=r"ran crossbar layers around the model .*: classifier: evaluate the whole"):
        evaluate_robustness(model.bert, evaluate, **OPTIONS)
    with deploy(model.bert, "1d"):
        evaluate(model)
    (text,) = [r.getMessage() for r in caplog.records if "around the model" in r.getMessage()]
    assert text.endswith("deploy the whole model: classifier")
    encoded = {key: value for key, value in batch.items() if key != "labels"}
    assert evaluate_robustness(model.bert, lambda bert: float(bert(**encoded)[0].detach().sum()), **OPTIONS)


def test_a_config_that_changes_meanwhile_is_refused():
    x = torch.randn(16, 8)
    model = patched(Reading(lambda model, x: x), x)

    def evaluate(model):
        reconfigure(model, temperature=400)
        return score(model, x)

    with pytest.raises(RuntimeError, match="ReRAMConfig changed while it was evaluated"):
        evaluate_robustness(model, evaluate, references=False, **OPTIONS)
