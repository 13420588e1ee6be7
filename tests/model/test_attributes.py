"""What modules hold beside their state dict tells one model from another; what a forward writes does not."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_reram import ReRAMConfig, calibrate, evaluate_robustness, patch_model, report_of, unpatch_model
from hf_reram.model.attributes import attributes_of
from hf_reram.model.digest import model_digest
from tests.samples.models import bert_batch, tiny_bert


def count(module, args):
    module.hooked = getattr(module, "hooked", 0) + 1


class Net(nn.Module):
    power = 1.0

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.pool, self.sizes, self.calls, self.seen, self.lengths = "max", (2, 2), 0, None, []
        self.shift, self.weights, self.act, self.last = torch.zeros(4), {"mean": 1.0}, torch.relu, nn.Identity()
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.register_buffer("cached", torch.zeros(4), persistent=False)
        self.register_buffer("slots", torch.zeros(4), persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_forward_pre_hook(count)

    def forward(self, x):
        self.calls += 1
        self.remember(x)
        y = self.last(self.act(self.norm(self.proj(x)) * self.scale**self.power + self.shift)) * self.weights["mean"]
        return y.amax(1) if self.pool == "max" else y.mean(1)

    @torch.no_grad()
    def remember(self, x):
        self.seen = float(x.sum())
        self.cached.add_(1)
        self.slots[0] = self.calls
        self.lengths.append(x.shape[1])
        self.register_buffer("table", torch.arange(x.shape[1]), persistent=False)


def net():
    torch.manual_seed(0)
    return calibrate(patch_model(Net().eval(), ReRAMConfig()), [torch.randn(8, 3, 4)])


def score(model):
    return float(model(torch.ones(2, 3, 4)).sum().detach())


CHANGES = {
    "pool": lambda n: setattr(n, "pool", "mean"),
    "sizes": lambda n: setattr(n, "sizes", (2, 3)),
    "scale": lambda n: n.scale.fill_(3.0),
    "eps": lambda n: setattr(n.norm, "eps", 0.5),
    "power": lambda n: setattr(n, "power", 2.0),
    "shift": lambda n: n.shift.add_(1),
    "weights": lambda n: n.weights.update(mean=2.0),
    "act": lambda n: setattr(n, "act", torch.tanh),
    "class": lambda n: setattr(n, "last", nn.ReLU()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_report_is_not_of_other_attributes(name, tmp_path):
    model = net()
    log = tmp_path / "log.jsonl"
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    assert report_of(model) is report and report.notes == report_of(model).notes
    owner = model_digest(model)
    CHANGES[name](model)
    assert report_of(model) is None and model_digest(model) != owner
    with pytest.raises(ValueError, match="another config"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    del report.model_config["modules"]  # as reports of earlier versions
    assert report_of(model) is report


def test_a_forward_changes_nothing_that_tells_a_model():
    model = net()
    fresh, owner = attributes_of(Net()), model_digest(model)
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False)
    model(torch.ones(1, 7, 4))
    assert model.calls > 3 and len(model.table) == 7
    assert report_of(model) is report and model_digest(model) == owner
    assert attributes_of(model) == fresh == attributes_of(copy.deepcopy(model)) == attributes_of(unpatch_model(model))
    assert CHANGES.keys() <= fresh.keys()
    assert fresh.keys().isdisjoint(("calls", "seen", "lengths", "cached", "slots", "table", "hooked", "training"))


def test_what_changes_in_an_evaluation_by_other_means_is_named_and_not_compared():
    model = net()

    def evaluate(model):
        vars(model)["rounds"] = vars(model).get("rounds", 0) + 1
        return score(model)

    model.rounds = 0
    report = evaluate_robustness(model, evaluate, ["1d"], seeds=1, progress=False)
    assert "attributes of modules changed while the model was evaluated: rounds" in report.notes
    assert report_of(model) is report


def test_trained_compiled_and_loaded_models_are_told_alike(tmp_path):
    model = calibrate(patch_model(tiny_bert(), ReRAMConfig()), [bert_batch()])
    told = attributes_of(model)
    assert told["position_ids"] and told["eps"]
    model.gradient_checkpointing_enable()
    assert attributes_of(model.train()) == told == attributes_of(torch.compile(model))
    model.save_pretrained(tmp_path)
    assert attributes_of(BertForSequenceClassification.from_pretrained(tmp_path, hidden_dropout_prob=0.3)) == told
    assert attributes_of(tiny_bert(layer_norm_eps=0.1)) != told


def test_the_last_bits_of_a_buffer_are_those_of_a_device():
    module = nn.Module()
    module.register_buffer("frequencies", torch.rand(64) + 1, persistent=False)
    told = attributes_of(module)
    module.frequencies += 1e-3
    assert attributes_of(module) != told
    module.frequencies = torch.full((64,), 1.0)
    one = attributes_of(module)
    module.frequencies = torch.nextafter(module.frequencies, torch.tensor(2.0))
    assert attributes_of(module) == one
