"""What modules hold beside their state dict tells one model from another; what a forward writes does not."""

import copy
import functools
import inspect
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import checkpoint
from transformers import BertForSequenceClassification, LlamaConfig, LlamaModel

from hf_reram import ReRAMConfig, calibrate, evaluate_robustness, patch_model, report_of, unpatch_model
from hf_reram.model.attributes import CODE, VALUES, attributes_of
from hf_reram.model.digest import model_digest, other_settings, settings_of
from tests.samples.models import bert_batch, tiny_bert


def count(module, args):
    module.hooked = getattr(module, "hooked", 0) + 1


@dataclass
class Settings:
    gain: float = 1.0
    calls: int = 0

    def count(self):
        self.calls += 1


def scaled(x, factor):
    return x * factor


class Net(nn.Module):
    power = 1.0

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.pool, self.sizes, self.calls, self.seen, self.lengths = "max", (2, 2), 0, None, []
        self.shift, self.weights, self.act, self.last = torch.zeros(4), {"mean": 1.0}, torch.relu, nn.Identity()
        self.table, self.kinds, self.by_layer = np.ones(4), {"a", "b"}, {0: 1.0, 1: 2.0}
        self.partial, self.settings = functools.partial(scaled, factor=1.0), Settings()
        self.space, self.size, self.mixed = types.SimpleNamespace(gain=1.0), np.float32(1.0), {"shift": torch.ones(4)}
        self.adapt = lambda x: x * 1.0
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.register_buffer("cached", torch.zeros(4), persistent=False)
        self.register_buffer("slots", torch.zeros(4), persistent=False)
        self.register_buffer("places", torch.zeros(1), persistent=False)
        self.register_forward_pre_hook(count)

    def forward(self, x):
        self.calls += 1
        self.settings.count()
        self.remember(x)
        y = self.last(self.act(self.norm(self.proj(x)) * self.scale**self.power + self.shift)) * self.weights["mean"]
        return y.amax(1) if self.pool == "max" else y.mean(1)

    @torch.no_grad()
    def remember(self, x):
        self.seen = float(x.sum())
        self.cached.add_(1)
        self.slots[0] = self.calls
        self.lengths.append(x.shape[1])
        self.register_buffer("places", torch.arange(x.shape[1]), persistent=False)

    @property
    def device(self):
        return next(iter(()))  # as of modules without parameters

    def training_step(self, x):
        self.power = 1.0  # which no forward runs


def doubled(self, x):
    return 2 * Net.forward(self, x)


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
    "table" + VALUES: lambda n: setattr(n, "table", np.full(4, 2.0)),
    "kinds": lambda n: n.kinds.add("c"),
    "by_layer": lambda n: n.by_layer.update({1: 3.0}),
    "partial": lambda n: setattr(n, "partial", functools.partial(scaled, factor=2.0)),
    "settings": lambda n: setattr(n.settings, "gain", 2.0),
    "space": lambda n: setattr(n.space, "gain", 2.0),
    "size": lambda n: setattr(n, "size", np.float32(2.0)),
    "mixed" + VALUES: lambda n: n.mixed.update(shift=torch.zeros(4)),
    "adapt of " + CODE: lambda n: setattr(n, "adapt", lambda x: x * 2.0),
    "forward of " + CODE: lambda n: setattr(n, "forward", types.MethodType(doubled, n)),
    "hooks of " + CODE: lambda n: n.norm.register_forward_hook(lambda module, args, output: output * 2),
}


FLOATS = ("scale", "shift")  # of which only sums are told, beside the digest


@pytest.mark.parametrize("name", CHANGES)
def test_a_report_is_not_of_other_attributes(name, tmp_path):
    model = net()
    log = tmp_path / "log.jsonl"
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    assert report_of(model) is report and report.notes == report_of(model).notes
    owner = model_digest(model)
    CHANGES[name](model)
    assert report_of(model) is None and ((model_digest(model) == owner) == (name.endswith(VALUES) or name in FLOATS))
    with pytest.raises(ValueError, match="another config"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    del report.model_config["modules"]  # as reports of earlier versions
    assert report_of(model) is report


def test_a_forward_changes_nothing_that_tells_a_model():
    model = net()
    fresh, owner = attributes_of(Net()), model_digest(model)
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False)
    model(torch.ones(1, 7, 4))
    assert model.calls > 3 and len(model.places) == 7
    assert report_of(model) is report and model_digest(model) == owner
    assert attributes_of(model) == fresh == attributes_of(copy.deepcopy(model)) == attributes_of(unpatch_model(model))
    told = {f"{name}{VALUES}" if name in FLOATS else CODE if name.endswith(CODE) else name for name in CHANGES}
    assert told <= fresh.keys()
    names = {name.partition(" ")[0] for name in fresh}
    assert names.isdisjoint(("calls", "seen", "lengths", "cached", "slots", "places", "hooked", "training", "device"))


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
    assert told[CODE] == attributes_of(nn.Linear(1, 1))[CODE]  # all of it is of libraries
    model.gradient_checkpointing_enable()
    model.grad_checkpointing, model.bert.checkpointing_function, model.model_tags = True, checkpoint, ["trl"]
    assert attributes_of(model.train()) == told == attributes_of(torch.compile(model))
    model.save_pretrained(tmp_path)
    assert attributes_of(BertForSequenceClassification.from_pretrained(tmp_path, hidden_dropout_prob=0.3)) == told
    assert attributes_of(tiny_bert(layer_norm_eps=0.1)) != told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_last_bits_of_tables_are_those_of_a_device(dtype):
    def module(table):
        made = nn.Module()
        made.register_buffer("table", table.to(dtype), persistent=False)
        return settings_of(made)

    generator = torch.Generator().manual_seed(0)
    table = torch.exp(torch.randn(10_000, generator=generator))
    mine = module(table)
    for seed in range(20):
        noise = torch.randint(-1, 2, table.shape, generator=generator.manual_seed(seed))
        assert other_settings(mine, module(table * (1 + noise * 2.0**-23))) == []
    for other in (table * 1.001, table.flip(0), table[1:], torch.where(table == table.max(), 0.0, table)):
        assert other_settings(mine, module(other)) == ["modules.table values"]
    assert other_settings(mine, {"modules": {"table": "a hash of an earlier version"}}) == []


def test_masks_of_infinities_are_told():
    def module(mask):
        made = nn.Module()
        made.mask = mask
        return settings_of(made)

    mask = torch.full((4, 4), -torch.inf).triu(1)
    least = mask.clamp(min=torch.finfo(torch.float32).min)
    assert other_settings(module(mask), module(mask.clone())) == []
    for other in (mask.T.contiguous(), torch.full((4, 4), -torch.inf).triu(2), least.T.contiguous()):
        assert other_settings(module(mask), module(other)) == ["modules.mask values"]


def rotary(kind):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    parameters |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    names = parameters if kind == "longrope" else ("rope_type", "rope_theta", "factor")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": 50, "max_position_embeddings": 16}
    return LlamaModel(LlamaConfig(**shape, **sizes, rope_parameters={name: parameters[name] for name in names})).eval()


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "longrope"])
def test_rotary_frequencies_count_where_no_forward_changes_them(kind):
    model = rotary(kind)
    told = settings_of(model)
    with torch.no_grad():
        model(torch.arange(30)[None])  # beyond max_position_embeddings
    assert settings_of(model) == told
    model.rotary_emb.inv_freq.mul_(0.25)
    found = other_settings(told, settings_of(model))
    assert found == ([] if kind in ("dynamic", "longrope") else ["modules.inv_freq values"])


def typed(source, **names):
    """What a script defines, in a module of its own."""
    space = {"nn": nn, "torch": torch, "__name__": "script", **names}
    exec(source, space)
    return space


SOURCE = """
FACTOR, SHIFTS = 2.0, {"a": 1.0}

def helper(x):
    return x * FACTOR

class Inner(nn.Module):
    def forward(self, x):
        return helper(x) + SHIFTS["a"] + args.gain

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("helper(x) + ", "helper(x) - "),
        ("x * FACTOR", "x / FACTOR"),
        ("FACTOR, SHIFTS = 2.0", "FACTOR, SHIFTS = 3.0"),
        ('"a": 1.0', '"a": 2.0'),
        ("return self.inner(x)", "return self.inner(x) + 1"),
    ],
)
def test_the_code_of_a_scripts_own_classes_counts(old, new):
    def settings(source, **args):
        return settings_of(typed(source, args=types.SimpleNamespace(**args))["Outer"]())

    mine = settings(SOURCE, gain=1.0)
    assert settings(SOURCE.replace("class Inner", "# a comment\n\nclass Inner"), gain=1.0, lr=0.1) == mine
    assert other_settings(mine, settings(SOURCE.replace(old, new), gain=1.0)) == [f"modules.{CODE}"]
    assert other_settings(mine, settings(SOURCE, gain=2.0)) == [f"modules.{CODE}"]


def test_a_library_s_method_that_a_script_replaces_counts(monkeypatch):
    model = tiny_bert()
    mine = settings_of(model)
    before = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: before(self, x) * 2)
    assert other_settings(mine, settings_of(model)) == [f"modules.{CODE}"]


def test_what_wraps_a_forward_in_a_training_tells_nothing():
    """As accelerate wraps it to cast."""
    model = net()
    told = attributes_of(model)
    inner = model.forward

    model.forward = types.MethodType(torch.autocast("cpu")(inner.__func__), model)
    assert inspect.unwrap(model.forward) is Net.forward and attributes_of(model) == told
    model.forward = functools.partial(torch.no_grad()(inner))
    assert attributes_of(model) == told


def test_a_stored_report_and_a_resumed_evaluation_know_tables(tmp_path):
    """Up to the last bits, in which devices differ."""
    batch, log = {"input_ids": torch.arange(12).reshape(2, 6)}, tmp_path / "log.jsonl"

    def score(model):
        with torch.no_grad():
            return float(model(**batch).last_hidden_state.abs().sum())

    model = calibrate(patch_model(rotary("default"), ReRAMConfig()), [batch])
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log, key="score")
    frequencies = model.rotary_emb.inv_freq
    frequencies.copy_(torch.nextafter(frequencies, torch.ones_like(frequencies) * 9))
    assert report_of(model) is report
    again = evaluate_robustness(model, lambda model: 0.0, ["1d"], seeds=1, progress=False, resume=log, key="score")
    assert again.measurements == report.measurements
    frequencies.mul_(0.25)
    assert report_of(model) is None
    with pytest.raises(ValueError, match="what differs: 'modules'"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log, key="score")


class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.length, self.gain = None, 1.0

    def forward(self, x):
        return x * self.gain * self.mask[: self.length]

    @functools.cached_property
    def mask(self):
        return torch.ones(8)


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.windows = nn.ModuleList([Window()])

    def forward(self, x):
        for window in self.windows:
            window.length = len(x)
            x = window(x)
        return x


def test_what_a_forward_writes_on_modules_inside_and_remembers_tells_nothing():
    """As Swin has it."""
    model = Windows()
    told = attributes_of(model)
    model(torch.ones(5))
    assert model.windows[0].length == 5 and len(vars(model.windows[0])["mask"]) == 8
    assert attributes_of(model) == told and "gain" in told
    model.windows[0].gain = 2.0
    assert other_settings(told, attributes_of(model)) == ["gain"]


def recording(gain, kind):
    """A module with a hook that keeps what it sees in variables around it, and scales by another."""
    model, calls, seen, by_name, kept = nn.Linear(2, 2), 0, [], {}, types.SimpleNamespace(gain=gain, calls=0)

    def counting(module, args, output):
        nonlocal calls
        calls += 1
        by_name.setdefault("all", []).append(output.detach())
        kept.calls += 1
        return output * kept.gain

    if kind == "function":
        model.register_forward_hook(counting)
    else:
        _ = (by := gain), model.register_forward_hook(lambda m, a, o: seen.append(o.detach()) or o * by)
    return model, lambda: (calls, len(seen), kept.calls)


@pytest.mark.parametrize("kind, count", [("function", (2, 0, 2)), ("lambda", (0, 2, 0))])
def test_what_a_hook_records_tells_nothing_and_what_it_computes_with_does(kind, count):
    model, counts = recording(1.0, kind)
    told = attributes_of(model)
    for _ in range(2):
        model(torch.ones(2, 2))
    assert counts() == count and attributes_of(model) == told == attributes_of(recording(1.0, kind)[0])
    assert other_settings(told, attributes_of(recording(2.0, kind)[0])) == [CODE]


def test_a_model_of_libraries_is_the_same_in_another_python(monkeypatch):
    model, own = patch_model(nn.Sequential(nn.Linear(2, 2)), ReRAMConfig()), net()
    digests = [model_digest(model), model_digest(own)]
    monkeypatch.setattr("hf_reram.model.attributes.CODE", "code of Python 3.1")
    assert model_digest(model) == digests[0] and model_digest(own) != digests[1]
