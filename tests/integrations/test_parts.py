"""Models of which parts were patched by themselves, saved and loaded as one."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, evaluate_robustness, patch_model
from hf_reram.model.find import crossbar_states
from tests.samples.models import bert_batch, tiny_bert

DEVICES = {"encoder": "hfox-neurram", "decoder": "cmo-hfox-ibm"}


def towers() -> EncoderDecoderModel:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = BertConfig(**shape, intermediate_size=32, is_decoder=True, add_cross_attention=True)
    encoder = BertConfig(**shape, intermediate_size=32)
    return EncoderDecoderModel(encoder=BertModel(encoder), decoder=BertLMHeadModel(decoder)).eval()


BATCH = {"input_ids": torch.randint(1, 50, (4, 6)), "decoder_input_ids": torch.randint(1, 50, (4, 5))}


@torch.no_grad()
def logits(model, batch=BATCH):
    torch.manual_seed(0)  # of the read noise
    return model(**batch).logits


def devices(model) -> dict[str, str]:
    return {name: layer.crossbar.config.device.name for name, layer in crossbar_layers(model).items()}


@pytest.mark.parametrize("parts", [["encoder", "decoder"], ["encoder"], ["decoder"]])
def test_each_part_comes_back_on_its_own_device(parts, tmp_path):
    model = towers()
    for part in parts:
        patch_model(getattr(model, part), ReRAMConfig(device=DEVICES[part], learn_input_range=part == "encoder"))
    calibrate(model, [BATCH])
    folders = [tmp_path / "first", tmp_path / "second"]
    before = devices(model)
    assert set(before.values()) == {DEVICES[part] for part in parts}
    again = model
    for folder in folders:  # saved again as it came
        again.save_pretrained(folder)
        again = EncoderDecoderModel.from_pretrained(folder).eval()
        assert devices(again) == before
        assert all(layer.calibrated for layer in crossbar_layers(again).values())
        torch.testing.assert_close(logits(again), logits(model))


def test_parts_go_on_another_device_each_by_itself(tmp_path, caplog):
    model = towers()
    for part, device in DEVICES.items():
        patch_model(getattr(model, part), ReRAMConfig(device=device))
    calibrate(model, [BATCH]).save_pretrained(tmp_path / "first")
    asked = ReRAMConfig(device="cmo-hfox-ibm")
    with caplog.at_level("WARNING", "hf_reram"):
        model = EncoderDecoderModel.from_pretrained(tmp_path / "first", quantization_config=asked).eval()
    assert "is of hfox-neurram, and its calibration with it: put on cmo-hfox-ibm" in caplog.text
    assert set(devices(model).values()) == {"cmo-hfox-ibm"}
    calibrations = {name: layer.calibrated for name, layer in crossbar_layers(model).items()}
    assert all(done == name.startswith("decoder") for name, done in calibrations.items())
    calibrate(model, [BATCH]).save_pretrained(tmp_path / "second")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "second").eval()
    torch.testing.assert_close(logits(again), logits(model))
    config = EncoderDecoderModel.config_class.from_pretrained(tmp_path / "first")
    config.encoder.quantization_config = asked.to_dict()
    with pytest.raises(ValueError, match="quantization_config of BertModel is not the checkpoint's"):
        EncoderDecoderModel.from_pretrained(tmp_path / "first", config=config)


def test_towers_of_images_and_texts_too(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": 50}, vision_config={**shape, "image_size": 16, "patch_size": 8}
    )
    model = CLIPModel(config).eval()
    patch_model(model.vision_model, ReRAMConfig(device="cmo-hfox-ibm"))
    batch = {"input_ids": torch.randint(1, 49, (2, 6)), "pixel_values": torch.randn(2, 3, 16, 16)}
    calibrate(model, [batch])
    model.save_pretrained(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path).eval()
    assert devices(again) == devices(model) and len(devices(again)) > 4
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits_per_text, model(**batch).logits_per_text)


def test_beside_a_part_that_was_patched_alone_the_rest_stays_digital(tmp_path):
    model, batch = tiny_bert(), bert_batch()
    patch_model(model.bert, ReRAMConfig())
    calibrate(model, [batch])
    names, again = list(crossbar_layers(model)), model
    for folder in (tmp_path / "first", tmp_path / "second"):
        again.save_pretrained(folder)
        again = BertForSequenceClassification.from_pretrained(folder).eval()
        assert list(crossbar_layers(again)) == names and type(again.classifier) is torch.nn.Linear
        torch.testing.assert_close(logits(again, batch), logits(model, batch))


def test_an_encoder_and_decoder_with_copies_of_the_config_are_no_parts(tmp_path):
    """All layers are of one state, whose config the loaded model has, so that it is the model that was saved."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)).eval()
    tokens = {"input_ids": torch.arange(2, 14).view(2, 6), "labels": torch.arange(2, 14).view(2, 6)}
    calibrate(patch_model(model, ReRAMConfig(retention_times=["1d"])), [tokens])
    model.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert len(crossbar_states(loaded)) == 1
    assert loaded.config.quantization_config is crossbar_states(loaded)[0].config
    log = tmp_path / "log.jsonl"
    runs = [
        evaluate_robustness(m, lambda m: float(m(**tokens).loss.detach()), ["1d"], seeds=1, resume=log, progress=False)
        for m in (model, loaded)
    ]
    assert runs[0].measurements == runs[1].measurements
