"""Numbers of calibration are float32, whatever the model's dtype."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, crossbar_layers, deploy, patch_model
from hf_reram.nn.layer import BUFFERS
from tests.samples.models import bert_batch


def numbers(model) -> dict[str, torch.Tensor]:
    layers = crossbar_layers(model).items()
    return {f"{name}.{b}": getattr(layer, b).detach().clone() for name, layer in layers for b in BUFFERS}


def same(model, expected) -> None:
    found = numbers(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


@pytest.fixture
def calibrated(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(redundancy=0.3, equalize_inputs=True))
    return calibrate(tiny_bert, [bert_batch()])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.float64),
        lambda m: m.half().float(),
        lambda m: m.bfloat16().to("cpu", torch.float16),
    ],
    ids=["half", "bf16", "float64", "there and back", "twice"],
)
def test_through_changes_of_dtype(calibrated, change):
    expected = numbers(calibrated)
    same(change(calibrated), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_of_a_model_that_is_bfloat16_when_patched(tiny_bert, learned, tmp_path):
    model = tiny_bert.to(torch.bfloat16)
    patch_model(model, ReRAMConfig(learn_input_range=learned))
    calibrate(model, [bert_batch()])
    expected = numbers(model)
    assert all(value.dtype == torch.float32 for value in expected.values())
    # Not rounded to bfloat16's 8 bits.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(stored[name].dtype == torch.float32 for name in expected)
    assert stored["classifier.weight"].dtype == torch.bfloat16
    for dtype in ("auto", torch.bfloat16, torch.float32):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        same(again, expected)
        wanted = torch.bfloat16 if dtype == "auto" else dtype
        assert again.classifier.weight.dtype == wanted


def test_a_state_dict_of_another_dtype_is_read_into_float32(calibrated):
    for assign in (False, True):
        state = {name: value.bfloat16() for name, value in calibrated.state_dict().items()}
        calibrated.load_state_dict(state, assign=assign)
        assert all(value.dtype == torch.float32 for value in numbers(calibrated).values())


def test_full_evaluation_in_bfloat16(calibrated, tmp_path):
    expected = numbers(calibrated)
    rows = [{key: value[i] for key, value in bert_batch().items()} for i in range(8)]
    arguments = TrainingArguments(str(tmp_path), bf16_full_eval=True, use_cpu=True, report_to=[])
    trainer = ReRAMTrainer(model=calibrated, args=arguments, eval_dataset=rows)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 10
    same(calibrated, expected)


def test_a_learned_range_stays_the_parameter_that_an_optimizer_knows():
    model = nn.Sequential(nn.Linear(4, 3))
    patch_model(model, ReRAMConfig(learn_input_range=True))
    calibrate(model, [torch.randn(8, 4)])
    parameter = model[0].input_range
    model.half()
    assert model[0].input_range is parameter and parameter.dtype == torch.float32


def test_chips_of_a_half_precision_model_are_those_of_its_numbers(calibrated):
    batch = bert_batch()
    with torch.no_grad(), deploy(calibrated, "1d", seed=1):
        wanted = {name: layer.chip.weight for name, layer in crossbar_layers(calibrated).items()}
    calibrated.to(torch.bfloat16)
    with torch.no_grad(), deploy(calibrated, "1d", seed=1):
        assert torch.isfinite(calibrated(**batch).logits).all()
        for name, layer in crossbar_layers(calibrated).items():
            scale = float(layer.held_scale(torch.float32).max())
            torch.testing.assert_close(layer.chip.weight.float(), wanted[name], rtol=0.02, atol=0.02 * scale)


def test_numbers_are_float32_on_the_meta_device_and_after_it():
    model = nn.Sequential(nn.Linear(6, 5))
    patch_model(model, ReRAMConfig())
    model.to("meta").half()
    assert all(getattr(model[0], name).dtype == torch.float32 for name in BUFFERS)
    model.to_empty(device="cpu")
    assert all(getattr(model[0], name).dtype == torch.float32 for name in BUFFERS)
    assert model[0].weight.dtype == torch.float16


def test_a_learned_range_that_is_not_calibrated_is_that_of_the_batch():
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(20, 8)
    found = []
    for kind in ("static", "learned"):
        model = patch_model(copy.deepcopy(plain), ReRAMConfig(input_range=kind))
        found += [model.train()(x), model.eval()(x)]
    for y in found[1:]:
        torch.testing.assert_close(y, found[0])
    assert float((found[0] - plain(x)).norm() / plain(x).norm()) < 0.3
