"""A report is a model's only on the weights and the hardware that it was measured on."""

import json
import logging

import pytest
from transformers import BertForSequenceClassification

from hf_reram import ReRAMConfig, evaluate_robustness, patch_model, report_of, unpatch_model
from hf_reram.hub.push import prepare
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
