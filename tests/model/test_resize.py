"""A head whose vocabulary is resized stays on its crossbar, with the numbers of calibration."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, evaluate_robustness, patch_model, unpatch_model
from hf_reram.nn.layer import BUFFERS


def llama(tied: bool = False) -> LlamaForCausalLM:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32, tie_word_embeddings=tied)).eval()


def bert() -> BertForMaskedLM:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**shape, intermediate_size=32, tie_word_embeddings=False)).eval()


BATCH = {"input_ids": torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))}


def patched(model, **changes):
    return calibrate(patch_model(model, ReRAMConfig(**changes)), [BATCH])


@torch.no_grad()
def logits(model):
    torch.manual_seed(0)  # of the read noise
    return model(**BATCH).logits


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("sharing", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("size", [40, 60])
def test_an_untied_head_stays_on_its_crossbar(make, sharing, size, tmp_path, caplog, monkeypatch):
    for name in ("model.resize", "integrations.saving"):
        monkeypatch.setattr(logging.getLogger(f"hf_reram.{name}"), "propagate", True)
    model = patched(make(), weight_scale=sharing)
    names, before = list(crossbar_layers(model)), logits(model)
    old = model.get_output_embeddings()
    buffers = {name: getattr(old, name).clone() for name in BUFFERS}
    model.resize_token_embeddings(size)
    head, kept = model.get_output_embeddings(), min(size, 50)
    assert list(crossbar_layers(model)) == names and head.calibrated and head.weight.shape[0] == size
    for name, value in buffers.items():
        now = getattr(head, name)
        assert torch.equal(now[:kept] if len(now) == size else now, value[:kept] if len(value) == 50 else value), name
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    said = " ".join(record.getMessage() for record in caplog.records)
    assert ("10 new outputs are not calibrated" in said) == (size > 50)
    caplog.clear()
    model.save_pretrained(tmp_path)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert ("nobody can tell later" in said and "(from output 50)" in said) == (size > 50)
    again = type(model).from_pretrained(tmp_path).eval()
    assert list(crossbar_layers(again)) == names and all(layer.calibrated for layer in crossbar_layers(again).values())
    torch.testing.assert_close(logits(again), logits(model))
    report = evaluate_robustness(again, lambda m: float(logits(m).sum()), ["1d"], seeds=1, progress=False)
    assert report.uncalled == []


def newer(model) -> list[str]:
    report = evaluate_robustness(model, lambda m: float(logits(m).sum()), ["1d"], seeds=1, progress=False)
    found = [note for note in report.notes if note.startswith("outputs that are newer than their layers' calibration")]
    return [note.partition("are not calibrated: ")[2] for note in found]


@pytest.mark.parametrize("sharing", ["per_channel", "per_tensor"])
def test_a_report_notes_outputs_that_are_not_calibrated(sharing):
    model = patched(llama(), weight_scale=sharing)
    for size, told in [
        (60, ["lm_head (10 of 60)"]),
        (55, ["lm_head (5 of 55)"]),
        (45, []),
        (47, ["lm_head (2 of 47)"]),
    ]:
        model.resize_token_embeddings(size)
        assert newer(model) == told
    assert newer(copy.deepcopy(model)) == told
    calibrate(model, [BATCH])
    assert newer(model) == []
    fresh = patch_model(llama(), ReRAMConfig())  # which is not calibrated at all, and noted as such
    fresh.resize_token_embeddings(60)
    assert newer(fresh) == []


@pytest.mark.parametrize("size", [40, 60])
def test_a_tied_head_stays_digital(size, tmp_path):
    model = patched(llama(tied=True))
    names = list(crossbar_layers(model))
    model.resize_token_embeddings(size)
    assert list(crossbar_layers(model)) == names and "lm_head" not in names
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert list(crossbar_layers(again)) == names
    torch.testing.assert_close(logits(again), logits(model))


def test_copies_and_reloaded_models_keep_theirs_too(tmp_path):
    patched(llama()).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(60)
    assert type(twin.lm_head) is type(model.lm_head) and twin.lm_head.out_features == 60
    assert model.lm_head.out_features == 50 and twin.lm_head.crossbar is not model.lm_head.crossbar


def test_learned_ranges_and_sensitivity_go_along():
    model = patched(llama(), learn_input_range=True)
    model.lm_head.sensitivity = torch.arange(50.0)
    model.resize_token_embeddings(40)
    assert isinstance(model.lm_head.input_range, nn.Parameter)
    assert torch.equal(model.lm_head.sensitivity, torch.arange(40.0))
    model.resize_token_embeddings(45)
    assert model.lm_head.sensitivity is None


def test_a_chip_is_not_resized():
    model = patched(llama())
    with deploy(model, "1d"), pytest.raises(ValueError, match="'lm_head' is deployed as a chip"):
        model.resize_token_embeddings(60)


def test_off_the_crossbars_all_is_as_transformers_has_it():
    model = unpatch_model(patched(llama()))
    model.resize_token_embeddings(60)
    assert type(model.lm_head) is nn.Linear
    assert not {"set_output_embeddings", "save_pretrained"} & set(vars(model))
