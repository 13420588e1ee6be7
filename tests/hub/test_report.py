"""A report is a model's only on the weights and the hardware that it was measured on."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_reram import ReRAMConfig, deploy, evaluate_robustness, patch_model, reconfigure, report_of, unpatch_model
from hf_reram.hub.card import BEGIN, END, UNMEASURED
from hf_reram.hub.push import HfApi, prepare, push
from hf_reram.integrations.saving import standing_in
from hf_reram.model.digest import weights_digest
from tests.samples.models import bert_batch, tiny_bert


def measured(**changes):
    """Not clipped and not calibrated, so that nothing but the config tells the hardware."""
    model = patch_model(tiny_bert(), ReRAMConfig(weight_clip=None, **changes))
    report = evaluate_robustness(
        model, lambda m: float(m(**bert_batch()).loss.detach()), ["1d"], seeds=1, progress=False
    )
    return model, report


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.hub.report"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if "its figures are not" in r.getMessage()]


def test_a_report_of_another_device_is_not_attached(tmp_path, said):
    model, report = measured(device="hfox-neurram")
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    load = BertForSequenceClassification.from_pretrained
    assert report_of(load(tmp_path)).weights == report.weights and said() == []
    other = patch_model(unpatch_model(model), ReRAMConfig(weight_clip=None, device="cmo-hfox-ibm"))
    other.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert report_of(again) is None
    assert len(said()) == 1 and "with another device" in said()[0]
    with pytest.raises(ValueError, match="was measured with another device"):
        prepare(tmp_path, again)


def test_a_report_of_another_config_of_the_model_is_not_attached(tmp_path, said):
    model, report = measured()
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    load = BertForSequenceClassification.from_pretrained
    assert report_of(load(tmp_path, hidden_dropout_prob=0.2)).weights == report.weights and said() == []
    other = load(tmp_path, hidden_act="relu", num_attention_heads=4)
    assert report_of(other) is None and "with another hidden_act, num_attention_heads" in said()[0]
    with pytest.raises(ValueError, match="was measured with another hidden_act"):
        prepare(tmp_path, other)
    model.config.hidden_act = "relu"
    assert report_of(model) is None
    data = json.loads((tmp_path / "robustness.json").read_text())
    del data["model_config"]  # as reports of earlier versions
    (tmp_path / "robustness.json").write_text(json.dumps(data))
    assert report_of(load(tmp_path)).weights == report.weights


def test_loss_and_times_of_training_are_no_hardware(tmp_path):
    model, report = measured()
    report.to_json(tmp_path / "robustness.json")
    model.config.quantization_config.retention_weight = 7.0
    model.save_pretrained(tmp_path)
    assert report_of(BertForSequenceClassification.from_pretrained(tmp_path)).weights == report.weights


def test_a_config_that_cannot_be_read_is_no_hardware_of_ours(tmp_path, said):
    model, report = measured()
    report.config["device"] = 3
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    assert report_of(BertForSequenceClassification.from_pretrained(tmp_path)) is None
    assert "cannot be read" in said()[0]


def of_snippet(card: str, model) -> float:
    """The figure of the chip that the card's own line deploys."""
    call = re.search(r"with hf_reram\.deploy\((.*)\):", card)[1]
    with eval(f"deploy({call})", {"deploy": deploy, "model": model}):
        return float(model(**bert_batch()).loss.detach())


@pytest.mark.parametrize("configured, asked, later", [(None, None, 420), (420, None, None), (None, 420, None)])
def test_the_card_deploys_the_chip_that_was_measured(tmp_path, configured, asked, later):
    """Whatever temperature the model is deployed at by itself since; read noise apart, which is drawn anew."""
    device = {**ReRAMConfig().device.to_dict(), "read_noise": 0.0}
    model = patch_model(tiny_bert(), ReRAMConfig(device=device, temperature=configured))
    report = evaluate_robustness(
        model, lambda m: float(m(**bert_batch()).loss.detach()), ["1d"], [asked], seeds=1, progress=False
    )
    figure = report.measurements[0].metrics["metric"]
    kelvin = float(asked or configured or 298.15)
    model.save_pretrained(tmp_path)
    prepare(tmp_path, model)
    before = (tmp_path / "README.md").read_text()
    assert of_snippet(before, model) == figure and ("temperature=" in before) == (asked is not None)
    assert f"after programming at {kelvin:g} K" in before or kelvin == 298.15
    reconfigure(model, temperature=later, retention_loss="output", retention_times=["1h"])
    model.save_pretrained(tmp_path)
    for again in (model, BertForSequenceClassification.from_pretrained(tmp_path)):
        prepare(tmp_path, again)
        card = (tmp_path / "README.md").read_text()
        assert f"temperature={kelvin}, seed=0" in card and of_snippet(card, again) == figure
        assert card.count(f"after programming at {kelvin:g} K") >= 3  # metadata, headline, snippet
        assert f", of a single chip at {kelvin:g} K, so that" in card
        assert f"none is known of; mapped for 1h at {later or 298.15:g} K" in card
        assert f"at {kelvin:g} K" in report_of(again).to_markdown()
        assert json.loads((tmp_path / "robustness.json").read_text())["measurements"][0]["temperature"] == kelvin
    with deploy(model, "1d"):
        assert float(model(**bert_batch()).loss.detach()) != figure or asked is not None
    reconfigure(model, temperature=configured)
    assert report_of(model) is report


def towers(*configs):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in configs)).eval()
    for part, config in zip(model, configs):
        patch_model(part, config)
    report = evaluate_robustness(
        model, lambda m: float(m(torch.ones(2, 6)).sum().detach()), ["1d"], seeds=1, progress=False
    )
    return model, report


def test_a_report_is_of_the_devices_of_all_parts(tmp_path):
    model, report = towers(ReRAMConfig(weight_clip=None), ReRAMConfig(weight_clip=None, device="cmo-hfox-ibm"))
    assert report_of(model) is report
    report.to_json(tmp_path / "robustness.json")
    (tmp_path / "model.safetensors").touch()
    prepare(tmp_path, model)
    card = (tmp_path / "README.md").read_text()
    assert "crossbars" in card and "hfox-neurram and cmo-hfox-ibm ReRAM crossbars" in card
    assert "| hfox-neurram | cmo-hfox-ibm |\n| --- | --- | --- |\n| conductance |" in card
    names = [part[0].crossbar.config.device for part in model]
    row = f"| {names[0].g_min:g}–{names[0].g_max:g} µS, differential pairs | {names[1].g_min:g}–{names[1].g_max:g} µS"
    assert row in card
    patch_model(unpatch_model(model[1]), ReRAMConfig(weight_clip=None))
    assert report_of(model) is None
    with pytest.raises(ValueError, match="measured with another device"):
        prepare(tmp_path, model)
    report.other_configs = []  # as reports of earlier versions
    report.to_json(tmp_path / "robustness.json")
    with pytest.raises(ValueError, match="measured with 1 configs of parts, where the model's parts have 2"):
        prepare(tmp_path, model)


def test_parts_at_temperatures_of_their_own_are_no_model_at_one(tmp_path):
    model, report = towers(ReRAMConfig(temperature=400), ReRAMConfig())
    assert report.temperatures == [None] and report_of(model) is report
    reconfigure(model, temperature=400)
    assert report_of(model) is None
    reconfigure(model[1], temperature=None)
    assert report_of(model) is report


def test_figures_of_other_weights_do_not_stay_where_a_model_is_saved(tmp_path):
    model, report = measured()
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    prepare(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    left = {path.name for path in tmp_path.iterdir()}
    assert before.keys() - left == {"robustness.json", "robustness.png"}
    assert not (tmp_path / "README.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert report_of(BertForSequenceClassification.from_pretrained(tmp_path)) is None


def published(folder, **changes):
    """A measured model's folder with its weights and figures, and what is in it."""
    model, report = measured(**changes)
    model.save_pretrained(folder)
    report.to_json(folder / "robustness.json")
    prepare(folder, model)
    return model, report, in_folder(folder)


def in_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def card_says(folder):
    return (folder / "README.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()


def test_figures_are_held_against_the_state_that_is_saved(tmp_path):
    """Not against the model, which may be elsewhere, as beside an average of its weights."""
    model, report, before = published(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path, state_dict=state)
    assert in_folder(tmp_path) == before
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert weights_digest(again) == report.weights != weights_digest(model)
    assert report_of(again).measurements == report.measurements and report_of(model) is None
    model.load_state_dict(state)
    other = {**state, "classifier.bias": state["classifier.bias"] + 1}
    model.save_pretrained(tmp_path, state_dict=other)
    assert before.keys() - in_folder(tmp_path).keys() == {"robustness.json", "robustness.png"}
    assert not card_says(tmp_path) and report_of(model).weights == report.weights
    assert model.state_dict()["classifier.bias"].equal(state["classifier.bias"])
    assert report_of(BertForSequenceClassification.from_pretrained(tmp_path)) is None


@pytest.mark.parametrize("left_out, stay", [(r"input_range|adc_range|gain", True), (r"classifier\.bias", False)])
def test_of_a_state_that_lacks_something_figures_are_of_what_is_loaded(tmp_path, left_out, stay):
    """Crossbars' numbers are saved by themselves; other weights would be made anew."""
    model, _, before = published(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not re.search(left_out, name)}
    model.save_pretrained(tmp_path, state_dict=state)
    assert (in_folder(tmp_path) == before) == stay and ("robustness.json" in in_folder(tmp_path)) == stay


def test_of_a_state_with_tied_weights_once_figures_stay(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = patch_model(BertForMaskedLM(BertConfig(vocab_size=20, **sizes)).eval(), ReRAMConfig())
    tokens = torch.arange(6)[None]
    score = lambda m: float(m(tokens).logits.mean().detach())  # noqa: E731
    report = evaluate_robustness(model, score, ["1d"], seeds=1, progress=False)
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    state = load_file(tmp_path / "model.safetensors")
    assert len(model.state_dict().keys() - state.keys()) == 2  # the decoder's weight and bias
    with torch.no_grad():
        model.cls.predictions.bias.add_(1)
    model.save_pretrained(tmp_path, state_dict=dict(state))
    assert report_of(BertForMaskedLM.from_pretrained(tmp_path)).measurements == report.measurements
    state["cls.predictions.bias"] = state["cls.predictions.bias"] + 1
    model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / "robustness.json").exists()


def test_weights_of_a_variant_leave_the_figures_of_those_beside_them(tmp_path):
    model, _, before = published(tmp_path / "both")
    model.half().save_pretrained(tmp_path / "both", variant="fp16")
    after = in_folder(tmp_path / "both")
    assert after.keys() - before.keys() == {"model.fp16.safetensors"}
    assert all(after[name] == before[name] for name in before if name != "config.json")
    model, _, before = published(tmp_path / "alone")
    (tmp_path / "alone" / "model.safetensors").unlink()
    model.half().save_pretrained(tmp_path / "alone", variant="fp16")
    assert "robustness.json" not in in_folder(tmp_path / "alone") and not card_says(tmp_path / "alone")


def test_a_card_is_of_the_state_that_stands_in(tmp_path):
    """As in ``save_pretrained(push_to_hub=True, state_dict=...)``."""
    model, report, before = published(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.classifier.bias.add_(1)
    with standing_in(model, state):
        prepare(tmp_path, model)
    assert in_folder(tmp_path)["README.md"] == before["README.md"] and UNMEASURED not in card_says(tmp_path)
    with pytest.raises(ValueError, match="measured on other weights"):
        prepare(tmp_path, model)
    model.load_state_dict(state)
    assert report_of(model) is report
    with standing_in(model, {**state, "classifier.bias": state["classifier.bias"] + 1}):
        assert report_of(model) is None
        (tmp_path / "robustness.json").unlink()
        prepare(tmp_path, model)
    assert UNMEASURED in card_says(tmp_path) and not (tmp_path / "robustness.png").exists()


@pytest.mark.parametrize("of_model", [False, True])
def test_an_upload_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, of_model):
    def fail(*args, **options):
        raise OSError("no such user")

    model, report = measured()
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    monkeypatch.setattr(HfApi, "create_repo", fail)
    for text in (None, "Mine."):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(OSError, match="no such user"):
            if of_model:  # as its push_to_hub does
                model._upload_modified_files(tmp_path, "me/x")
            else:
                push(tmp_path, "me/x")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
