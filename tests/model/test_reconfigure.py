"""Loss, times and temperature change without a new mapping."""

import copy
import gc
import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, evaluate_robustness, patch_model, reconfigure
from hf_reram.model.find import crossbar_state
from hf_reram.nn.layer import BUFFERS
from tests.samples.models import bert_batch


@pytest.fixture
def robust(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="output"))
    return calibrate(tiny_bert, [bert_batch()])


def numbers(model):
    return {f"{n}.{b}": getattr(m, b).clone() for n, m in crossbar_layers(model).items() for b in BUFFERS}


def test_what_is_no_hardware_changes_and_calibration_stays(robust):
    before = numbers(robust)
    assert reconfigure(robust, retention_loss="drift", retention_times=["10y"], temperature="85C") is robust
    config = crossbar_state(robust).config
    assert (config.retention_loss, config.retention_times, config.temperature) == ("drift", ["10y"], 358.15)
    assert robust.config.quantization_config.to_dict() == config.to_dict()
    assert crossbar_state(robust).physics.term is None
    after = numbers(robust)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("wrong", [{"device": "generic"}, {"weight_clip": None}, {"retention_times": []}])
def test_hardware_and_wrong_values_are_refused(robust, wrong):
    before = crossbar_state(robust).config.to_dict()
    with pytest.raises(ValueError, match="allowed"):
        reconfigure(robust, **wrong)
    assert crossbar_state(robust).config.to_dict() == before


def test_loading_for_another_loss_keeps_the_calibration(robust, tmp_path):
    robust.save_pretrained(tmp_path)
    asked = ReRAMConfig(retention_loss="none", temperature=330)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=asked)
    before, after = numbers(robust), numbers(loaded)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert loaded.config.quantization_config.to_dict() == asked.to_dict()


def test_loading_for_other_cells_puts_the_model_on_them(robust, tmp_path, caplog):
    robust.save_pretrained(tmp_path)
    asked = ReRAMConfig(device="cmo-hfox-ibm", weight_scale="per_tensor")
    with caplog.at_level("WARNING", "hf_reram"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=asked)
    assert (
        "put on cmo-hfox-ibm as quantization_config says, which differs in device, weight_scale, the model"
        in caplog.text
    )
    layers = crossbar_layers(loaded)
    assert all(
        layer.crossbar.config.device.name == "cmo-hfox-ibm" and not layer.calibrated for layer in layers.values()
    )
    for name, value in robust.state_dict().items():
        if name.rpartition(".")[2] not in BUFFERS:
            assert torch.equal(loaded.state_dict()[name], value), name
    with caplog.at_level("WARNING", "hf_reram"), deploy(loaded, "1d"):
        loaded(**bert_batch())
    assert "are not calibrated: each batch spans an input range of its own" in caplog.text
    report = evaluate_robustness(loaded, lambda m: float(m(**bert_batch()).loss), ["1d"], seeds=1, progress=False)
    assert any("are not calibrated" in note for note in report.notes)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").config.quantization_config.device.name == "cmo-hfox-ibm"


@pytest.mark.parametrize(
    "changes, what", [({"input_range": "per_token"}, "input_range"), ({"target_modules": ["query"]}, "layers")]
)
def test_loading_for_other_cells_of_the_same_device_says_what_differs(robust, tmp_path, caplog, changes, what):
    robust.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_reram"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=ReRAMConfig(**changes))
    assert f"put on hfox-neurram as quantization_config says, which differs in {what}, the model" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_not_convert": ["classifier"]},
        {"target_modules": r"bert\.encoder\..*(query|key)"},
        {"target_modules": ["query", "classifier"]},
    ],
)
def test_checkpoints_open_with_another_head_or_none(tiny_bert, tmp_path, options):
    patch_model(tiny_bert, ReRAMConfig(**options))
    calibrate(tiny_bert, [bert_batch()])
    tiny_bert.save_pretrained(tmp_path)
    encoder = {name: m for name, m in crossbar_layers(tiny_bert).items() if name.startswith("bert.")}
    bare = AutoModel.from_pretrained(tmp_path)
    assert set(crossbar_layers(bare)) == {name.removeprefix("bert.") for name in encoder}
    assert all(layer.calibrated for layer in crossbar_layers(bare).values())
    other = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert {n for n in crossbar_layers(other) if n.startswith("bert.")} == set(encoder) - {"bert.pooler.dense"}
    assert all(layer.calibrated for n, layer in crossbar_layers(other).items() if n.startswith("bert."))


def test_a_head_alone_on_crossbars_leaves_the_encoder_digital(tiny_bert, tmp_path, caplog):
    patch_model(tiny_bert, ReRAMConfig(target_modules=["classifier"]))
    calibrate(tiny_bert, [bert_batch()]).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_reram"):
        bare = AutoModel.from_pretrained(tmp_path)
    assert crossbar_layers(bare) == {} and "none of the checkpoint's crossbar layers are in BertModel" in caplog.text


def test_a_field_of_the_models_own_config_is_reconfigured(robust):
    own = robust.config.quantization_config

    def as_a_chip():
        torch.manual_seed(0)  # of the read noise
        with deploy(robust, "1d", seed=0), torch.no_grad():
            return robust(**bert_batch()).logits

    cold = as_a_chip()
    own.temperature = 400
    assert crossbar_state(robust).config.temperature == own.temperature == 400
    assert robust.config.quantization_config.temperature == 400
    assert not torch.equal(as_a_chip(), cold)
    reconfigure(robust, temperature=None)
    assert torch.equal(as_a_chip(), cold)
    crossbar_state(robust).config.retention_loss = "drift"
    assert crossbar_state(robust).term is None
    with pytest.raises(ValueError, match="retention_times"):
        robust.config.quantization_config.retention_times = []


def test_it_is_the_same_config_after_each_change(robust, caplog):
    """Whoever holds it, as a Trainer does, sees and sets what counts, however often it was changed before."""
    own = robust.config.quantization_config
    for weight in (5.0, 7.0):
        own.retention_weight = weight
        assert crossbar_state(robust).config is own is robust.config.quantization_config
        assert own.retention_weight == weight
    reconfigure(robust, retention_times=["1y"])
    assert own.retention_times == ["1y"] and crossbar_state(robust).physics.times == (31557600.0,)
    with caplog.at_level("WARNING", "hf_reram"):
        own.dac_bits = 4
        own.device = own.device.name  # what it is
    assert caplog.text.count("has no effect") == 1 and own.dac_bits is None


def test_one_config_for_many_models(caplog):
    config = ReRAMConfig()
    for _ in range(30):
        model = patch_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
    gc.collect()
    assert len(config.__dict__["_told"]) == 1  # those that are gone are not called, or kept
    with caplog.at_level("WARNING", "hf_reram"):
        config.retention_weight = 2.0
    assert config.retention_weight == 2.0 and crossbar_state(model).config.retention_weight == 0.3
    assert "retention_weight=2.0 has no effect" in caplog.text


def test_hardware_of_the_models_own_config_stays_and_says_so(robust, caplog):
    with caplog.at_level("WARNING", "hf_reram"):
        robust.config.quantization_config.dac_bits = 4
    assert "ReRAMConfig.dac_bits=4 has no effect" in caplog.text and "unpatch_model" in caplog.text
    assert robust.config.quantization_config.dac_bits is None is crossbar_state(robust).config.dac_bits


def test_the_config_that_was_handed_over_says_that_it_has_no_effect(tiny_bert, caplog):
    config = ReRAMConfig(retention_times=["1d"])
    patch_model(tiny_bert, config)
    with caplog.at_level("WARNING", "hf_reram"):
        config.temperature = 350
        config.adc_bits = 8
    assert (
        "ReRAMConfig.temperature=350.0 has no effect" in caplog.text and "reconfigure(model, temperature" in caplog.text
    )
    assert "ReRAMConfig.adc_bits=8 has no effect" in caplog.text
    assert config.temperature == 350  # for the next model
    with pytest.raises(TypeError, match="not changed in place"):
        config.retention_times.append("10y")
    kept = crossbar_state(tiny_bert).config
    assert (kept.temperature, kept.adc_bits, kept.retention_times) == (None, None, ["1d"])
    assert tiny_bert.config.quantization_config.to_dict() == kept.to_dict()
    caplog.clear()
    with caplog.at_level("WARNING", "hf_reram"):
        copy.deepcopy(config).temperature = 360
        config.temperature = 350
    assert not caplog.text


def test_copies_and_loaded_models_hear_of_their_own_config(robust, tmp_path):
    other = copy.deepcopy(robust)
    other.config.quantization_config.temperature = 370
    assert crossbar_state(other).config.temperature == 370 and crossbar_state(robust).config.temperature is None
    other.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert crossbar_state(loaded).config.temperature == 370
    loaded.config.quantization_config.temperature = 380
    assert crossbar_state(loaded).config.temperature == 380 and crossbar_state(other).config.temperature == 370
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["temperature"] == 380
    assert crossbar_state(pickle.loads(pickle.dumps(loaded))).config.temperature == 380
