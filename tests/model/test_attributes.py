"""What modules hold beside their state dict tells one model from another; what a forward writes does not."""

import argparse
import copy
import functools
import importlib
import inspect
import json
import threading
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributions import Normal
from torch.utils import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_reram import ReRAMConfig, calibrate, evaluate_robustness, patch_model, report_of, unpatch_model
from hf_reram.evaluation.content import described
from hf_reram.hub.report import why_foreign
from hf_reram.model.attributes import CODE, VALUES, attributes_of
from hf_reram.model.description import Description
from hf_reram.model.digest import model_digest, other_settings, settings_of
from hf_reram.model.source import set_since
from tests.samples.models import bert_batch, tiny_bert
from tests.samples.squad import tokenizer


@dataclass
class Settings:
    gain: float = 1.0


def scaled(x, factor):
    return x * factor


class Net(nn.Module):
    power = 1.0

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.pool, self.sizes, self.calls, self.seen, self._gain = "max", (2, 2), 0, None, 1.0
        self.shift, self.weights, self.act, self.last = torch.zeros(4), {"mean": 1.0}, torch.relu, nn.Identity()
        self.table, self.kinds, self.by_layer = np.ones(4), {"a", "b"}, {0: 1.0, 1: 2.0}
        self.partial, self.settings = functools.partial(scaled, factor=1.0), Settings()
        self.space, self.size, self.mixed = types.SimpleNamespace(gain=1.0), np.float32(1.0), {"shift": torch.ones(4)}
        self.adapt = lambda x: x * 1.0
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.drop_below, self.limit, self.momentum, self.dropout = -100.0, -100.0, 1.0, 1.0

    def forward(self, x):
        self.calls += 1
        self.shift = self.shift.to(x.device)
        self.weights.setdefault("mean", 1.0)
        self.remember(x)
        x = x * self._gain * self.momentum * self.dropout
        y = self.last(self.act(self.norm(self.proj(x)) * self.scale**self.power + self.shift)) * self.weights["mean"]
        y = y * (y > self.drop_below) * (y > self.limit)
        return y.amax(1) if self.pool == "max" else y.mean(1)

    @torch.no_grad()
    def remember(self, x):
        other = types.SimpleNamespace()
        other.limit = self.seen = float(x.sum())

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
    "_gain": lambda n: setattr(n, "_gain", 2.0),
    "drop_below": lambda n: setattr(n, "drop_below", 0.5),
    "limit": lambda n: setattr(n, "limit", 0.5),
    "momentum": lambda n: setattr(n, "momentum", 2.0),
    "dropout": lambda n: setattr(n, "dropout", 2.0),
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


# What only looks like what a training or a library has, or a forward has for itself.
ALIKE = ("_gain", "shift", "weights", "limit", "drop_below", "momentum", "dropout")


@pytest.mark.parametrize("name", CHANGES)
def test_a_report_is_not_of_other_attributes(name, tmp_path):
    model = net()
    log = tmp_path / "log.jsonl"
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    assert report_of(model) is report and report.notes == report_of(model).notes
    owner, figure = model_digest(model), score(model)
    CHANGES[name](model)
    assert name not in ALIKE or score(model) != figure
    assert report_of(model) is None and ((model_digest(model) == owner) == (name.endswith(VALUES) or name in FLOATS))
    with pytest.raises(ValueError, match="another config"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log)
    del report.model_config["attributes"]  # as reports of earlier versions
    assert report_of(model) is report


def test_a_forward_changes_nothing_that_tells_a_model():
    model = net()
    fresh, owner = attributes_of(Net()), model_digest(model)
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False)
    model(torch.ones(1, 7, 4))
    assert model.calls > 3 and model.seen == 28
    assert report_of(model) is report and model_digest(model) == owner
    assert attributes_of(model) == fresh == attributes_of(copy.deepcopy(model)) == attributes_of(unpatch_model(model))
    told = {f"{name}{VALUES}" if name in FLOATS else CODE if name.endswith(CODE) else name for name in CHANGES}
    assert told <= fresh.keys()
    names = {name.partition(" ")[0] for name in fresh}
    assert names.isdisjoint(("calls", "seen", "training", "device"))


def test_what_changes_in_an_evaluation_by_other_means_is_named_and_not_compared():
    model = net()

    def evaluate(model):
        vars(model)["rounds"] = vars(model).get("rounds", 0) + 1
        return score(model)

    model.rounds = 0
    report = evaluate_robustness(model, evaluate, ["1d"], seeds=1, progress=False)
    assert "attributes of modules changed while the model was evaluated: rounds" in report.notes
    assert report_of(model) is report


class Recording(Net):
    """Reads what it records, so that nothing tells a record from a setting."""

    def __init__(self, settings=()):
        super().__init__()
        self.lengths = list(settings)

    def forward(self, x):
        self.lengths.append(x.shape[1])
        return super().forward(x) * len(self.lengths[:3])


def test_what_a_forward_adds_to_itself_tells_a_model_until_it_has(tmp_path):
    torch.manual_seed(0)
    model = calibrate(patch_model(Recording().eval(), ReRAMConfig()), [torch.randn(8, 3, 4)])
    options = {"times": ["1d"], "seeds": 1, "progress": False, "resume": tmp_path / "log.jsonl", "key": "score"}
    again = copy.deepcopy(model)
    report = evaluate_robustness(model, score, **options)
    assert "attributes of modules changed while the model was evaluated: lengths" in report.notes
    assert report_of(model) is report
    with pytest.raises(ValueError, match=r"\(what differs: 'attributes.lengths'\)"):
        evaluate_robustness(model, score, **options)
    assert evaluate_robustness(again, score, **options).measurements == report.measurements


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
        assert other_settings(mine, module(other)) == ["attributes.table values"]
    assert other_settings(mine, {"modules": {"table": "a hash of an earlier version"}}) == []


def test_masks_of_infinities_are_told():
    def module(mask):
        made = nn.Module()
        made.mask = mask
        return settings_of(made)

    mask = torch.full((4, 4), -torch.inf).triu(1)
    least = mask.clamp(min=torch.finfo(torch.float32).min)
    assert other_settings(module(mask), module(mask.clone())) == []
    others = mask.T.contiguous(), torch.full((4, 4), -torch.inf).triu(2), least.T.contiguous(), -mask, mask * torch.nan
    for other in others:
        assert other_settings(module(mask), module(other)) == ["attributes.mask values"]


class Biased(nn.Module):
    """Attention with a bias for distance, and a mask in the same table."""

    def __init__(self, slope, fill):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value, at = nn.Linear(4, 4), nn.Linear(4, 4), torch.arange(6)
        bias = -slope * (at[:, None] - at[None]).abs().float()
        self.register_buffer("bias", bias.masked_fill(at[None] > at[:, None], fill), persistent=False)

    def forward(self, x):
        return (self.query(x) @ x.mT + self.bias).softmax(-1) @ self.value(x)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min, -1e9])
def test_biases_are_told_beside_a_mask(fill, tmp_path):
    x = torch.randn(2, 6, 4)
    options = {"times": ["1d"], "seeds": 1, "progress": False}

    def spread(model):
        return float(model(x).std().detach())

    flat, same, steep = (calibrate(patch_model(Biased(s, fill), ReRAMConfig()), [x]) for s in (0.05, 0.05, 2.0))
    report = evaluate_robustness(flat, spread, resume=tmp_path / "log.jsonl", **options)
    assert abs(report.digital["metric"] - evaluate_robustness(steep, spread, **options).digital["metric"]) > 0.01
    steep.load_state_dict(flat.state_dict())  # with the numbers of calibration
    same.load_state_dict(flat.state_dict())
    assert why_foreign(same, report) == "" and why_foreign(steep, report) == "with another attributes.bias values"
    assert evaluate_robustness(same, spread, resume=tmp_path / "log.jsonl", **options) == report
    with pytest.raises(ValueError, match=r"what differs: 'attributes\.bias values'"):
        evaluate_robustness(steep, spread, resume=tmp_path / "log.jsonl", **options)


def test_one_module_s_large_table_hides_no_other_s_small_one():
    def module(small):
        made = nn.ModuleList([nn.Module(), nn.Module()])
        made[0].table, made[1].table = torch.full((100,), 5e3), torch.full((3,), small)
        return settings_of(made)

    assert other_settings(module(0.1), module(0.1)) == []
    assert other_settings(module(0.1), module(0.2)) == ["attributes.table values"]


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
    assert found == ([] if kind in ("dynamic", "longrope") else ["attributes.inv_freq values"])


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
    ("old", "new", "what"),
    [
        ("helper(x) + ", "helper(x) - ", CODE),
        ("x * FACTOR", "x / FACTOR", CODE),
        ("FACTOR, SHIFTS = 2.0", "FACTOR, SHIFTS = 3.0", "FACTOR in code"),
        ('"a": 1.0', '"a": 2.0', "SHIFTS in code"),
        ("return self.inner(x)", "return self.inner(x) + 1", CODE),
    ],
)
def test_the_code_of_a_scripts_own_classes_counts(old, new, what):
    def settings(source, **args):
        return settings_of(typed(source, args=types.SimpleNamespace(**args))["Outer"]())

    mine = settings(SOURCE, gain=1.0)
    assert settings(SOURCE.replace("class Inner", "# a comment\n\nclass Inner"), gain=1.0, lr=0.1) == mine
    assert other_settings(mine, settings(SOURCE.replace(old, new), gain=1.0)) == [f"attributes.{what}"]
    assert other_settings(mine, settings(SOURCE, gain=2.0)) == ["attributes.args.gain in code"]


def test_a_library_s_method_that_a_script_replaces_counts(monkeypatch):
    model = tiny_bert()
    mine = settings_of(model)
    before = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: before(self, x) * 2)
    assert other_settings(mine, settings_of(model)) == [f"attributes.{CODE}"]


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
    with pytest.raises(ValueError, match=r"what differs: 'attributes\.inv_freq values'"):
        evaluate_robustness(model, score, ["1d"], seeds=1, progress=False, resume=log, key="score")


class Dropped(nn.Dropout):
    """Also where it is evaluated."""

    def forward(self, x):
        return nn.functional.dropout(x, self.p, True)


@pytest.mark.parametrize(
    ("kind", "is_told"), [(nn.Dropout, False), (nn.Dropout2d, False), (nn.AlphaDropout, False), (Dropped, True)]
)
def test_the_probability_of_a_dropout_counts_where_it_is_a_script_s(kind, is_told):
    assert other_settings(attributes_of(kind(0.1)), attributes_of(kind(0.9))) == (["p"] if is_told else [])


def test_libraries_attributes_for_trainings_do_not_count_and_others_do():
    model = tiny_bert()
    told = settings_of(model)
    attention = model.bert.encoder.layer[0].attention.self
    attention._is_hf_initialized, attention.gradient_checkpointing, attention.attention_dropout = True, True, 0.5
    model.config.attention_probs_dropout_prob = model.config.hidden_dropout_prob = model.config.initializer_range = 0.5
    assert other_settings(told, settings_of(model)) == []
    model.config.token_dropout = model.config.drop_below = 0.5  # ESM scales by the former whenever it runs
    assert settings_of(model).keys() - told.keys() == {"token_dropout", "drop_below"}


class Windowed(SwinModel):
    def forward(self, *args, **kwargs):
        self.encoder.gain = self.encoder.layers[0].blocks[0].shift_size
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [SwinModel, Windowed])
def test_what_a_library_s_forward_sets_counts_where_a_script_reads_it(kind):
    """Swin shifts no windows that are as large as its images."""
    shape = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    model = kind(SwinConfig(**shape)).eval()
    block, told = model.encoder.layers[0].blocks[1], attributes_of(model)
    assert block.shift_size == 2
    with torch.no_grad():
        model(torch.ones(1, 3, 8, 8))
    assert block.shift_size == 0
    assert other_settings(told, attributes_of(model)) == ([] if kind is SwinModel else ["shift_size"])


class Mask(nn.Module):
    @functools.cached_property
    def mask(self):
        return torch.ones(8)

    def forward(self, x):
        return x * self.mask


def test_a_cached_property_that_is_set_by_hand_counts():
    model, other = Mask(), Mask()
    told = attributes_of(model)
    model(torch.ones(8))
    other.mask = torch.zeros(8)
    assert other_settings(told, attributes_of(model)) == []  # which only one of them has
    assert other_settings(attributes_of(model), attributes_of(other)) == ["mask values"]


class Own(PreTrainedConfig):
    def __init__(self, gain=1.0, **options):
        super().__init__(**options)
        self.gain = gain


def scaler(gain):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    return preprocessing.StandardScaler().fit(gain * np.array([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 5.0]]))


def filled(module, value):
    nn.init.constant_(module.weight, value)
    return module


OBJECTS = {
    "config": (Own, lambda held, x: x * held.gain, "part.gain"),
    "configs": (lambda gain: [Own(gain)], lambda held, x: x * held[0].gain, "part"),
    "generation": (lambda gain: GenerationConfig(temperature=gain), lambda held, x: x * held.temperature, None),
    "distribution": (lambda gain: Normal(gain, 1.0), lambda held, x: x * held.mean, "part values"),
    "estimator": (scaler, lambda held, x: x * float(held.mean_.sum()), "part values"),
    "encoding": (lambda gain: BatchEncoding({"gain": gain}), lambda held, x: x * held["gain"], "part"),
    "descriptor": (lambda gain: {1.0: torch.Tensor.abs}.get(gain, torch.Tensor.neg), lambda held, x: held(x), "part"),
    "dtype": (lambda gain: {1.0: torch.float32}.get(gain, torch.int32), lambda held, x: x.to(held) * 1.0, "part"),
    "hidden module": (lambda gain: [nn.LeakyReLU(-gain)], lambda held, x: held[0](x), "part"),
    "hidden weights": (lambda gain: [filled(nn.PReLU(), gain)], lambda held, x: held[0](x), "part values"),
}


class Holding(nn.Module):
    def __init__(self, part, use):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.part, self.use = nn.Linear(4, 4), part, use

    def forward(self, x):
        return self.use(self.part, self.proj(x))


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_libraries_that_a_script_s_module_holds_count(kind):
    make, use, name = OBJECTS[kind]
    one, same, other = (Holding(make(gain), use) for gain in (1.0, 1.0, 3.0))
    x = torch.randn(5, 4)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    assert other_settings(settings_of(one), settings_of(same)) == []
    assert other_settings(settings_of(one), settings_of(other)) == [f"attributes.{name or 'part.temperature'}"]


class Argued(nn.Module):
    def __init__(self, args):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.args = nn.Linear(4, 4), args

    def forward(self, x):
        return self.scaled(self.proj(x))

    def scaled(self, x):
        return x * self.args.gain


def test_of_a_script_s_arguments_those_count_that_code_of_its_modules_reads():
    def told(**args):
        return settings_of(Argued(argparse.Namespace(**args)))

    assert other_settings(told(gain=1.0, chips=1), told(gain=1.0, chips=2)) == []
    assert other_settings(told(gain=1.0, chips=1), told(gain=2.0, chips=1)) == ["attributes.args.gain in code"]


class Handing(Argued):
    def scaled(self, x):
        return x * Factor(self.args).factor


class Factor:
    def __init__(self, args):
        self.factor = json.loads(json.dumps(vars(args)))["gain"]


class Held(Argued):
    def __init__(self, args):
        super().__init__(args)
        self.inner = Argued(self.args)


@pytest.mark.parametrize(("cls", "whole"), [(Handing, True), (Held, False)])
def test_arguments_that_a_module_hands_on_count_whole(cls, whole):
    def told(**args):
        return settings_of(cls(argparse.Namespace(**args)))

    one, other, more = told(gain=1.0, lr=1.0), told(gain=2.0, lr=1.0), told(gain=1.0, lr=2.0)
    assert "attributes.args.gain in code" in other_settings(one, other)
    assert other_settings(one, more) == (["attributes.args.lr in code"] if whole else [])


class Locked(Holding):
    def __init__(self):
        super().__init__(threading.Lock(), lambda held, x: x)


def test_what_nothing_tells_from_others_is_named_and_asks_for_a_key(tmp_path):
    x = torch.randn(5, 4)
    model = calibrate(patch_model(Locked().eval(), ReRAMConfig()), [x])
    options = {"times": ["1d"], "seeds": 1, "progress": False}

    def score(model):
        return float(model(x).sum().detach())

    report = evaluate_robustness(model, score, **options)
    assert "nothing tells from others what modules hold as part" in report.notes and report_of(model) is report
    with pytest.raises(ValueError, match="by what its modules hold as part: say with key="):
        evaluate_robustness(model, score, resume=tmp_path / "log.jsonl", **options)
    kept = evaluate_robustness(model, score, resume=tmp_path / "log.jsonl", key="score", **options)
    assert kept.measurements == report.measurements
    model.part = 1.0  # which is told
    with pytest.raises(ValueError, match=r"what differs: .*'attributes\.part untold'"):
        evaluate_robustness(model, score, resume=tmp_path / "log.jsonl", key="score", **options)


def generator(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    if kind == "decoder":
        return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, **sizes)).eval()
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**shape, **sizes)).eval()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_what_a_model_generates_with_counts(kind, tmp_path):
    model, ids = generator(kind), torch.arange(2, 14).reshape(2, 6)
    batch = {"input_ids": ids} if kind == "decoder" else {"input_ids": ids, "labels": ids}
    calibrate(patch_model(model, ReRAMConfig()), [batch])
    model.generation_config.max_new_tokens = 4
    options = {"times": ["1d"], "seeds": 1, "progress": False, "resume": tmp_path / "log.jsonl"}

    def length(model):
        return float(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).shape[1])

    report = evaluate_robustness(model, length, **options)
    assert report_of(model) is report and not any("changed" in note for note in report.notes)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert attributes_of(loaded) == attributes_of(model)
    if kind == "decoder":
        assert evaluate_robustness(loaded, length, **options).measurements == report.measurements
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 2, 6
    assert length(model) == report.digital["metric"] + 2 and report_of(model) is None
    changed = "'attributes.generation_config.max_new_tokens', 'attributes.generation_config.num_beams'"
    with pytest.raises(ValueError, match=rf"what differs: {changed}\)"):
        evaluate_robustness(model, length, **options)


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
def test_what_a_hook_records_is_named_apart_from_what_it_computes_with(kind, count):
    model, counts = recording(1.0, kind)
    told = attributes_of(model)
    for _ in range(2):
        model(torch.ones(2, 2))
    gain, records = {"function": ("kept.gain", ["calls", "kept.calls"]), "lambda": ("by", [])}[kind]
    assert counts() == count and told == attributes_of(recording(1.0, kind)[0])
    assert other_settings(told, attributes_of(model)) == [f"{name} in code" for name in records]
    assert other_settings(told, attributes_of(recording(2.0, kind)[0])) == [f"{gain} in code"]


def test_two_variables_of_one_name_in_one_place_are_told_apart():
    def scaling(gain):
        return lambda module, args, output: output * gain

    def told(*gains):
        model = nn.Linear(2, 2)
        for gain in gains:
            model.register_forward_hook(scaling(torch.tensor(gain)))
        return attributes_of(model)

    assert other_settings(told(1.0, 2.0), told(1.0, 2.0)) == []
    for other in (told(1.0, 3.0), told(3.0, 2.0), told(2.0, 1.0)):
        assert "gain in code values" in other_settings(told(1.0, 2.0), other)


class Gain:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, module, args, output):
        self.gain = float(self.gain)
        return output * self.gain


def by_gain(gain, module, args, output):
    return output * gain


@pytest.mark.parametrize(
    "hook", [Gain, lambda gain: Gain(gain).__call__, lambda gain: functools.partial(by_gain, gain)], ids=range(3)
)
def test_what_a_hook_holds_counts(hook):
    models = [nn.Linear(2, 2) for _ in range(3)]
    for model, gain in zip(models, (1.0, 1.0, 2.0)):
        model.register_forward_hook(hook(gain))
    one, same, other = map(attributes_of, models)
    assert other_settings(one, same) == [] and len(other_settings(one, other)) == 1


class Causal(nn.Module):
    """Has a setting that a function elsewhere reads."""

    def __init__(self, is_causal):
        super().__init__()
        self.set_causal(is_causal)

    def set_causal(self, is_causal):
        self.is_causal = is_causal

    def forward(self, x):
        return sdpa_attention_forward(self, x, x, x, None)[0]


def test_what_a_forward_does_not_set_counts_whoever_reads_it():
    x = torch.randn(1, 2, 3, 4)
    one, other = Causal(True), Causal(False)
    assert not torch.equal(one(x), other(x))
    assert other_settings(attributes_of(one), attributes_of(other)) == ["is_causal"]


def test_a_model_of_libraries_is_the_same_in_another_python(monkeypatch):
    model, own = patch_model(nn.Sequential(nn.Linear(2, 2)), ReRAMConfig()), net()
    digests = [model_digest(model), model_digest(own)]
    monkeypatch.setattr("hf_reram.model.attributes.CODE", "code of Python 3.1")
    assert model_digest(model) == digests[0] and model_digest(own) != digests[1]


def test_one_number_of_a_large_buffer_counts_and_last_bits_do_not():
    def module(change=None):
        made = nn.Linear(2, 2)
        made.register_buffer("prior", torch.linspace(-9, -8, 20_000), persistent=False)
        if change is not None:
            change(made.prior)
        return attributes_of(made)

    torch.manual_seed(0)
    last_bits = 1 + torch.finfo(torch.float32).eps * torch.randn(20_000)
    assert other_settings(module(), module(lambda prior: prior[7].add_(1.6))) == ["prior values"]
    assert other_settings(module(), module(lambda prior: prior[4321].mul_(1.1))) == ["prior values"]
    assert other_settings(module(), module(lambda prior: prior.mul_(last_bits))) == []


LITERALS = 'NUMBERS = {0, 8}\nTABLE = {"a": [1, {2, 3}], "b": (1.0, None)}\n'


def test_sets_of_a_scripts_module_are_the_same_in_any_order(tmp_path, monkeypatch):
    """Their order is another in each process."""
    (tmp_path / "literals_of_a_script.py").write_text(LITERALS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("literals_of_a_script")
    assert set_since(module.__name__) == {}
    module.NUMBERS = {8}
    module.NUMBERS.add(0)
    assert list(module.NUMBERS) == [8, 0] and set_since(module.__name__) == {}
    module.NUMBERS.add(1)
    module.TABLE["a"][0] = 1.0
    assert set_since(module.__name__) == {"NUMBERS": module.NUMBERS, "TABLE": module.TABLE}


def test_what_libraries_count_of_their_use_does_not_tell():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(torch.arange(8.0), batch_size=2))
    iterator = iter(accelerator.prepare(DataLoader(torch.arange(8.0), batch_size=2)))
    next(iterator)  # of another loader, which accelerate refers to from all
    pipe = pipeline("text-classification", tiny_bert(), tokenizer=tokenizer(), device="cpu")
    for used, use in ((loader, lambda: list(loader)), (pipe, lambda: pipe("what is it"))):
        before = described(used)
        use()
        assert described(used) == before


def test_configs_are_told_once_and_not_each_of_their_labels(monkeypatch):
    labels = {str(at): f"label {at}" for at in range(3000)}
    model = patch_model(tiny_bert(), ReRAMConfig())
    model.config.id2label, model.config.label2id = labels, {name: at for at, name in labels.items()}
    calls, of = [], Description.of
    monkeypatch.setattr(Description, "of", lambda self, value: (calls.append(1), of(self, value))[1])
    before = settings_of(model)
    assert len(calls) < 3000
    model.config.id2label = {**labels, "7": "another"}
    assert settings_of(model) != before
