import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, load_model, patch_model, summarize
from hf_reram.integrations.quantizer import ADDED_LATER
from tests.samples.models import bert_batch


def calibrated(model, **options):
    patch_model(model, ReRAMConfig(**options))
    return calibrate(model, [bert_batch()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "6KB"])
def test_checkpoints_come_back_whole(tiny_bert, tmp_path, dtype, shard):
    calibrated(tiny_bert, device="cmo-hfox-ibm", dac_bits=8)
    tiny_bert.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    state, other = tiny_bert.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert again.config.quantization_config.to_dict() == tiny_bert.config.quantization_config.to_dict()
    with torch.no_grad(), deploy(tiny_bert, "1d", seed=1), deploy(again, "1d", seed=1):
        for model in (tiny_bert, again):
            torch.manual_seed(0)
            model.result = model(**bert_batch()).logits
    assert torch.equal(tiny_bert.result, again.result)
    assert not list(tmp_path.glob("*.bin"))


def test_a_checkpoint_on_measured_tables_comes_back_as_the_same_chip(tiny_bert, tmp_path):
    calibrated(tiny_bert, device="rram-levy-c")
    tiny_bert.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # which makes its config on "meta"
    with torch.no_grad(), deploy(tiny_bert, "1s", seed=1), deploy(again, "1s", seed=1):
        pairs = list(zip(crossbar_layers(tiny_bert).values(), crossbar_layers(again).values()))
        assert pairs and all(torch.equal(a.chip.weight, b.chip.weight) for a, b in pairs)
        assert not any(torch.equal(a.chip.weight, a.weight) for a, _ in pairs)


@pytest.mark.parametrize(
    ("number", "value", "allowed"),
    [
        ("range_shrink", 0.0, "from 1e-09 to 1"),
        ("range_shrink", 5.0, "from 1e-09 to 1"),
        ("gain", float("nan"), "a number from 0"),
        ("input_range", -1.0, "a number from 0"),
        ("adc_range", float("inf"), "a number from 0"),
        ("weight_scale", -0.1, "a number from 0"),
        ("input_floor", 5.0, "from -1 to 0"),
        ("pairs_per_weight", -3.0, "an integer from 1 to 64"),
        ("pairs_per_weight", 1e9, "an integer from 1 to 64"),
        ("pairs_per_weight", 1.5, "an integer from 1 to 64"),
        ("per_token", 0.5, "an integer from 0 to 1"),
        ("input_offset", float("-inf"), "a finite number"),
        ("input_scale", 0.0, "a number from"),
    ],
)
def test_numbers_that_no_calibration_leaves_are_refused(tiny_bert, tmp_path, number, value, allowed):
    calibrated(tiny_bert).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = f"bert.encoder.layer.0.attention.self.query.{number}"
    weights[key].view(-1)[0] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = rf"layer 'bert.encoder.layer.0.attention.self.query': {number}=.* allowed is .*{allowed}"
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path)
    before = tiny_bert.state_dict()[key].clone()
    with pytest.raises(ValueError, match=message):
        tiny_bert.load_state_dict(weights)
    assert torch.equal(tiny_bert.state_dict()[key], before)


def test_a_checkpoint_from_before_some_buffers_loads_as_it_was(tiny_bert, tmp_path):
    calibrated(tiny_bert, device="cmo-hfox-ibm", dac_bits=8, center_inputs=False)
    for layer in crossbar_layers(tiny_bert).values():
        layer.input_floor.fill_(-1.0)
    tiny_bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for later in ("center_inputs", "equalize_inputs", "redundancy"):
        del config["quantization_config"][later]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.endswith(ADDED_LATER)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tiny_bert.state_dict().items())


CMO = ReRAMConfig(device="cmo-hfox-ibm")


def as_argument(folder, asked):
    return BertForSequenceClassification.from_pretrained(folder, quantization_config=asked)


def in_the_config(folder, asked):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = asked
    return BertForSequenceClassification.from_pretrained(folder, config=config)


def by_load_model(folder, asked):
    return load_model(folder, quantization_config=asked)


@pytest.mark.parametrize("load", [as_argument, in_the_config, by_load_model])
@pytest.mark.parametrize("asked", [CMO, CMO.to_dict(), {"quant_method": "reram", "device": "cmo-hfox-ibm"}])
def test_another_device_is_asked_for_in_any_way(tiny_bert, tmp_path, caplog, load, asked):
    calibrated(tiny_bert).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_reram"):
        model = load(tmp_path, asked)
    assert "of hfox-neurram, and its calibration with it: put on cmo-hfox-ibm" in caplog.text
    layers = crossbar_layers(model).values()
    assert len(layers) == 14 and not any(layer.calibrated for layer in layers)
    assert {layer.crossbar.config.device.name for layer in layers} == {"cmo-hfox-ibm"}
    assert model.config.quantization_config.to_dict() == CMO.to_dict()


@pytest.mark.parametrize("load", [as_argument, in_the_config, by_load_model])
@pytest.mark.parametrize("words", [{}, {"target_modules": "all-linear"}, {"retention_times": ["10y"]}])
def test_the_same_cells_keep_their_calibration(tiny_bert, tmp_path, caplog, load, words):
    calibrated(tiny_bert).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_reram"):
        model = load(tmp_path, ReRAMConfig(**words))
    assert not caplog.text
    state = tiny_bert.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.config.quantization_config.retention_times == words.get("retention_times", ["1d"])


@pytest.mark.parametrize("load", [as_argument, in_the_config, by_load_model])
def test_a_digital_checkpoint_goes_on_what_is_asked_for(tiny_bert, tmp_path, load):
    tiny_bert.save_pretrained(tmp_path)
    layers = crossbar_layers(load(tmp_path, CMO)).values()
    assert len(layers) == 14 and {layer.crossbar.config.device.name for layer in layers} == {"cmo-hfox-ibm"}
    assert not any(layer.calibrated for layer in layers)


@pytest.mark.parametrize("words", [{}, {"target_modules": "all-linear"}])
def test_what_was_digital_stays_so_on_another_device_or_is_named(tiny_bert, tmp_path, caplog, words):
    patch_model(tiny_bert.bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()]).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_reram"):
        model = as_argument(tmp_path, ReRAMConfig(device="cmo-hfox-ibm", **words))
    assert "they stay digital: classifier" in caplog.text
    told = "were digital in the checkpoint, and are on crossbars now: classifier"
    assert (told in caplog.text) == bool(words)
    assert ("classifier" in crossbar_layers(model)) == bool(words) and len(crossbar_layers(model)) == 13 + len(words)


def test_a_digital_checkpoint_is_patched_by_from_pretrained(tiny_bert, tmp_path):
    tiny_bert.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=ReRAMConfig(weight_clip=2.0))
    assert summarize(model).layers == 14
    patch_model(tiny_bert, ReRAMConfig(weight_clip=2.0))
    for name, layer in crossbar_layers(tiny_bert).items():
        assert torch.equal(crossbar_layers(model)[name].weight_scale, layer.weight_scale)
    model.half().float()


def test_a_new_head_on_a_robust_body_starts_uncalibrated(tiny_bert, tmp_path):
    calibrated(tiny_bert)
    tiny_bert.bert.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert not crossbar_layers(again)["classifier"].calibrated
    assert crossbar_layers(again)["classifier"].weight_scale.min() > 0
    assert torch.isfinite(again(**bert_batch()).logits).all()


def test_learned_ranges_come_back_as_parameters(tiny_bert, tmp_path):
    calibrated(tiny_bert, learn_input_range=True)
    tiny_bert.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    names = [n for n, _ in again.named_parameters() if n.endswith("input_range")]
    assert len(names) == 14
    again.train()(**bert_batch()).loss.backward()
    assert all(again.get_parameter(n).grad is not None for n in names)


WITHOUT = """
import sys
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert "hf_reram" not in sys.modules
print(type(model.classifier).__name__, float(model.classifier.weight.sum()))
"""


def test_without_hf_reram_it_is_the_digital_model(tiny_bert, tmp_path, python):
    calibrated(tiny_bert)
    tiny_bert.save_pretrained(tmp_path / "model")
    (tmp_path / "without.py").write_text(WITHOUT)
    done = python.run(str(tmp_path / "without.py"), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    name, total = done.stdout.split()[-2:]
    assert name == "Linear"
    assert float(total) == pytest.approx(float(tiny_bert.classifier.weight.sum()), rel=1e-4)


def test_a_newer_checkpoint_is_a_clear_error(tiny_bert, tmp_path):
    calibrated(tiny_bert)
    tiny_bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="newer hf_reram"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_state_dict_that_is_given_is_saved(tiny_bert, tmp_path):
    calibrated(tiny_bert)
    halves = ("range_shrink", "input_floor")  # which may not grow beyond 1 and 0
    whole = {n: value / 2 if n.endswith(halves) else value + 1 for n, value in tiny_bert.state_dict().items()}
    tiny_bert.save_pretrained(tmp_path / "whole", state_dict=whole)
    again = BertForSequenceClassification.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    # Of weights alone: with the model's own numbers.
    weights = {name: value * 0.5 for name, value in tiny_bert.named_parameters()}
    tiny_bert.save_pretrained(tmp_path / "weights", state_dict=weights)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "weights")
    for name, value in tiny_bert.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights.get(name, value)), name
    # What is saved next is the model itself.
    tiny_bert.save_pretrained(tmp_path / "own")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "own")
    assert torch.equal(model.classifier.weight, tiny_bert.classifier.weight)


def test_numbers_that_a_checkpoint_lacks_are_named_and_make_no_layer_digital(tiny_bert, tmp_path, caplog):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()]).save_pretrained(tmp_path)
    lost = "bert.encoder.layer.0.intermediate.dense"
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(lost) or name.endswith((".weight", ".bias"))}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("WARNING", "hf_reram"):
        loaded = type(tiny_bert).from_pretrained(tmp_path)
    assert crossbar_layers(loaded).keys() == crossbar_layers(tiny_bert).keys()
    assert not crossbar_layers(loaded)[lost].calibrated
    assert "not in the checkpoint and so not calibrated" in caplog.text and lost in caplog.text


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_device_maps(tiny_bert, tmp_path, caplog, where):
    """A checkpoint whose weights stay on the disk is the same ideal crossbar, and no chip."""
    batch = bert_batch()
    calibrated(tiny_bert, device="hfox-neurram").save_pretrained(tmp_path / "robust")
    places = {"bert.embeddings": "cpu", "bert.pooler": "cpu", "bert.encoder": where, "classifier": where}
    with caplog.at_level("WARNING", "hf_reram"):
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "robust", device_map=places, offload_folder=tmp_path / "offload"
        )
    assert not [record for record in caplog.records if record.name.startswith("hf_reram")]
    assert model.classifier.weight.is_meta == (where == "disk")

    def logits(model):
        torch.manual_seed(0)  # of the read noise
        with torch.no_grad():
            return model(**batch).logits

    torch.testing.assert_close(logits(model), logits(tiny_bert.eval()))
    if where == "cpu":
        with deploy(model, "1d", seed=0), deploy(tiny_bert, "1d", seed=0):
            torch.testing.assert_close(logits(model), logits(tiny_bert))
        return
    for refused in (lambda: deploy(model, "1d").__enter__(), lambda: calibrate(model, [batch])):
        with pytest.raises(ValueError, match="on the meta device, as where accelerate has offloaded them"):
            refused()
