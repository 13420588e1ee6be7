"""A config from the Hub is data: whatever stands in it, it loads and runs on finite numbers, or is a ValueError."""

import copy
import json
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_reram import ReRAMConfig, add_retention_loss, crossbar_layers, deploy, patch_model, sampled_drift
from hf_reram.device import DeviceConfig
from hf_reram.model.select import _matched
from tests.samples.models import bert_batch

GENERIC = {"type": "generic", "A": 0.01, "tau": 1.0, "s0": 0.5, "s1": 0.05, "s2": 0.01}
CELLS = [DeviceConfig.from_preset(name).to_dict() for name in ("hfox-neurram", "cmo-hfox-ibm")]
CONFIGS = [ReRAMConfig(device=cell, tile_size=8, dac_bits=8, adc_bits=8).to_dict() for cell in CELLS]
CONFIGS.append(ReRAMConfig(device={**CELLS[1], "retention": GENERIC}, retention_loss="output+drift").to_dict())

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 2, 16, 1e-320, 1e-30, 1e-8, 1e8, 1e30, 1.7e308, True]),
)
words = st.sampled_from(
    ["", "auto", "none", "drift", "output", "../../etc/passwd", "hfox-neurram", "(a+)+$", "1d", "10y", "é\0"]
)
leaves = st.one_of(st.none(), numbers, words)
nested = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)
repeated = st.builds(lambda value, count: [value] * count, leaves, st.integers(2, 500))
ascending = st.builds(lambda count: [10.0**i for i in range(count)], st.integers(2, 60))


def deep(value, levels, key=None):
    """A value within so many lists, or objects."""
    for _ in range(levels):
        value = [value] if key is None else {key: value}
    return value


deeply = st.builds(deep, leaves, st.integers(5, 400), st.sampled_from([None, "device", "a"]))
values = st.one_of(nested, repeated, ascending, st.lists(repeated, min_size=1, max_size=5), deeply)


def places(data, path=()):
    """Paths of everything in a nested config."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def configs(draw):
    """A good config in which one to three places were replaced, removed or added to."""
    data = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(data) if p]))
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        match draw(st.sampled_from(["replace", "replace", "scale", "remove", "add"])):
            case "replace":
                owner[path[-1]] = draw(values)
            case "scale" if isinstance(owner[path[-1]], (int, float)):
                owner[path[-1]] *= draw(st.sampled_from([-1, 0.001, 1e3, 1e10, 1e-10]))
            case "remove":
                del owner[path[-1]]
            case "add" if isinstance(owner, dict):
                owner[draw(words)] = draw(values)
    return data


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_any_config_runs_or_is_refused(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = ReRAMConfig.from_dict(json.loads(json.dumps(data)))
            patched = patch_model(model(), config)
        except ValueError:
            return
        x = torch.randn(2, 3, 4, 4)
        with torch.no_grad():
            assert torch.isfinite(patched.eval()(x)).all()
            for time in ("1s", "10y"):
                with deploy(patched, time):
                    assert torch.isfinite(patched(x)).all()
        if "sensitivity" in config.retention_loss or config.retention_loss == "consistency":
            return  # the one needs calibration, the other the Trainer
        patched.train()
        with sampled_drift(patched):
            loss, _ = add_retention_loss(patched(x).square().mean(), patched)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in patched.parameters())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=configs())
def test_any_checkpoint_loads_or_is_refused(tiny_bert, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_bert.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**data, "quant_method": "reram"}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        except ValueError:
            return
        with deploy(loaded, "10y"), torch.no_grad():
            assert torch.isfinite(loaded(**bert_batch()).logits).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "../../../etc/passwd"}, "no preset"),
        ({"device": {**CELLS[0], "__class__": "os.system"}}, "unknown fields"),
        ({"tile_size": 1}, "tiles"),
        ({"target_modules": "(a|aa)+X"}, "took too long"),
        ({"retention_times": ["1d"] * 100_000}, "retention_times"),
        ({"version": 99}, "newer hf_reram"),
        ({"target_modules": "(" * 5000 + ")" * 5000}, "no regular expression"),
        ({"target_modules": "a|" * 100_000}, "characters"),
        ({"range_shrink": 10**400}, "range_shrink"),
        ({"retention_weight": 10**400}, "retention_weight"),
        ({"retention_times": [10**400]}, "retention_times"),
        ({"temperature": 10**400}, "temperature"),
        ({"device": {**CELLS[0], "programming": [1e-3] * 300}}, "300 coefficients"),
        ({"device": {**CELLS[0], "programming": [0.0, *[1e12, -1e12] * 15]}}, "errors of up to"),
        (
            {"device": {**CELLS[0], "retention": {"type": "table", "times": [1], "std": [[1] * 31], "g_ref": 1e12}}},
            "retention",
        ),
        (
            {"device": {**CELLS[0], "retention": {"type": "table", "times": [1], "std": [[1] * 31], "g_ref": 1e-12}}},
            "retention",
        ),
        ({"device": {**CELLS[0], "retention": deep({}, 3000, "retention")}}, "deep"),
        ({"device": deep(1, 3000)}, "deep"),
        ({"temperature": deep(1, 3000)}, "deep"),
        ({"nothing": deep(1, 3000)}, "deep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.replace(" ", "_"),
)
def test_what_a_hostile_config_might_try(changes, message):
    wide = nn.Sequential()
    wide.add_module("a" * 60, nn.Linear(5000, 2))
    with pytest.raises(ValueError, match=message):
        patch_model(wide, ReRAMConfig.from_dict({**CONFIGS[0], **changes}))


def test_all_names_share_the_time_of_a_regular_expression():
    names = nn.ModuleDict({f"{'a' * 40}{i}": nn.Linear(2, 2) for i in range(50)})
    begin = time.process_time()
    with pytest.raises(ValueError, match="took too long"):
        patch_model(names, ReRAMConfig(target_modules="(a|aa|aaa)+X"))
    assert time.process_time() - begin < 10
    assert _matched("(a|aa)+X", {"one": ["a" * 26]}) == set()  # 0.1 s
    begin = time.process_time()
    with pytest.raises(ValueError, match="300 layers together"):
        _matched("(a|aa)+X", {str(i): ["a" * 26] for i in range(300)})
    assert time.process_time() - begin < 10


def test_many_names_are_found_at_once():
    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"dense": nn.Linear(2, 2)}) for i in range(300)})
    begin = time.process_time()
    left = [f"layer{i}" for i in range(1, 300)] + ["dense", "layer0.dense"] * 50_000
    with pytest.raises(ValueError, match="nothing to patch"):
        patch_model(model, ReRAMConfig(modules_to_not_convert=left))
    patched = patch_model(model, ReRAMConfig(target_modules=[f"layer{i}.dense" for i in range(300)] * 300))
    assert len(crossbar_layers(patched)) == 300 and time.process_time() - begin < 30


def test_an_error_shows_no_more_than_a_reader_wants():
    with pytest.raises(ValueError) as error:
        ReRAMConfig(device={**CELLS[0], "programming": [1e300] * 100_000, "name": "x" * 100_000})
    assert len(str(error.value)) < 1000
