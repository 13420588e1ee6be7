"""Batches without padding, in which sequences stand behind one another, count as the sequences by themselves."""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, patch_model, retention_loss
from hf_reram.calibration import sensitivity
from hf_reram.nn.scalars import BUFFERS
from tests.samples.texts import TEXTS, llama, tokenizer

SEQUENCES = [tokenizer()(text)["input_ids"] for text in TEXTS[:3]]


def alone():
    return [{"input_ids": torch.tensor([ids])} for ids in SEQUENCES]


def padded():
    longest = max(map(len, SEQUENCES))
    rows = [(ids + [1] * (longest - len(ids)), [1] * len(ids) + [0] * (longest - len(ids))) for ids in SEQUENCES]
    ids, mask = map(torch.tensor, zip(*rows))
    return [{"input_ids": ids, "attention_mask": mask}]


def flattened(**options):
    """Whose labels leave out where a sequence begins."""
    return [DataCollatorWithFlattening(**options)([{"input_ids": ids} for ids in SEQUENCES])]


def packed():
    return flattened(return_flash_attn_kwargs=True, return_seq_idx=True)


def fresh():
    torch.manual_seed(0)
    return llama()


@pytest.mark.parametrize("batches", [padded, flattened, packed])
@pytest.mark.parametrize(("input_range", "range_shrink"), [("static", "auto"), ("per_token", 0.5)])
def test_statistics_are_those_of_the_sequences_alone(batches, input_range, range_shrink):
    found = []
    for make in (alone, batches):
        model = patch_model(fresh(), ReRAMConfig(input_range=input_range, range_shrink=range_shrink))
        found.append(crossbar_layers(calibrate(model, make())))
    for name, layer in found[0].items():
        for buffer in BUFFERS:
            one, other = getattr(layer, buffer), getattr(found[1][name], buffer)
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, b=buffer: f"{n}.{b}: {m}"
            )


@pytest.mark.parametrize("batches", [flattened, packed])
@pytest.mark.parametrize("kind", ["output", "sensitivity"])
def test_the_retention_loss_is_that_of_as_many_examples(batches, kind, monkeypatch):
    monkeypatch.setattr(sensitivity, "DRAWN", 32)
    model = calibrate(patch_model(fresh(), ReRAMConfig(retention_loss=kind)), alone()).train()
    found = []
    for make in (padded, batches):
        one = copy.deepcopy(model)
        one.config.use_cache = False  # as a Trainer has it
        (batch,) = make()
        outputs = one(**batch)
        found.append(float(retention_loss(one).detach()))
        assert outputs.logits.shape[-1] == 12
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 0


def test_sensitivity_is_that_of_the_sequences_alone(monkeypatch):
    monkeypatch.setattr(sensitivity, "DRAWN", 128)
    found = []
    for make in (alone, flattened):
        model = patch_model(fresh(), ReRAMConfig(retention_loss="sensitivity"))
        found.append(crossbar_layers(calibrate(model, make())))
    for name, layer in found[0].items():
        assert float(found[1][name].sensitivity.mean()) == pytest.approx(float(layer.sensitivity.mean()), rel=0.3)
