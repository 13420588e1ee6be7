"""Fused kernels compute what eager mode computes."""

import copy

import pytest
import torch
from torch import nn

import hf_reram.nn.ops.fused as fused
from hf_reram import ReRAMConfig, add_retention_loss, calibrate, deploy, patch_model, sampled_drift, use_fused_kernels
from hf_reram.nn.ops.functions import ShrunkSinh
from hf_reram.nn.ops.reference import POLYNOMIAL_B
from tests.samples.models import bert_batch

pytestmark = pytest.mark.compiler


@pytest.fixture(autouse=True, scope="module")
def _forget_graphs():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    use_fused_kernels(False)


def step(model, batch):
    """Loss and gradients of a training step."""
    with sampled_drift(model, seed=5):
        y = model(**batch) if isinstance(batch, dict) else model(batch)
    loss = y.loss if isinstance(batch, dict) else (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    total, _ = add_retention_loss(loss, model)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.detach(), gradients


def both(run, monkeypatch):
    """What it gives in eager mode, in fused kernels, and the kernels that ran."""
    eager, ran, compiled = run(), set(), fused._compiled
    use_fused_kernels()
    monkeypatch.setattr(fused, "_compiled", lambda kernel: ran.add(kernel.__name__) or compiled(kernel))
    return eager, run(), ran


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"retention_loss": "drift"}, ("_sinh", "_slope")),
        ({"retention_loss": "output+drift"}, ("_sinh", "_slope")),
        ({"retention_loss": "none", "center_inputs": False}, ("_sinh", "_slope")),
        ({"retention_loss": "none", "adc_bits": 8}, ("_sinh", "_slope", "_quantize")),
        ({"retention_loss": "none", "adc_bits": 8, "tile_size": 8}, ("_quantize",)),
    ],
    ids=str,
)
def test_bert(tiny_bert, options, expected, monkeypatch):
    batch = bert_batch()
    patch_model(tiny_bert, ReRAMConfig(**options))
    calibrate(tiny_bert, [batch])
    eager, compiled, ran = both(lambda: step(tiny_bert.train(), batch), monkeypatch)
    assert ran.issuperset(expected)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-6)
    for name, gradient in eager[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("loss", ["none", "output"])
def test_convolutions(layout, loss, monkeypatch):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Hardswish(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    model = model.to(memory_format=layout).append(nn.Conv2d(16, 4, 1, bias=False))
    x = torch.randn(3, 8, 11, 13).to(memory_format=layout)
    patch_model(model, ReRAMConfig(retention_loss=loss, adc_bits=8))
    calibrate(model, [x])
    eager, compiled, ran = both(lambda: step(model, x), monkeypatch)
    assert {"_sinh", "_slope", "_quantize"} <= ran
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-4, atol=1e-4)
    for name, gradient in eager[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("b", [0.02, 0.6, POLYNOMIAL_B])
@pytest.mark.parametrize("levels", [0, 7, 127])
@pytest.mark.parametrize("floor", [-1.0, 0.0])
@pytest.mark.parametrize("shape", [(5, 7, 16), (1, 16), (64, 1)], ids=str)
def test_values_and_slopes(b, levels, floor, shape):
    use_fused_kernels()
    x = (torch.randn(shape) * 2).requires_grad_()
    offset = torch.randn(shape[-1]) if levels != 7 else None
    s = ShrunkSinh.apply(x, 1.7, b, levels, 1.3, floor, offset)
    (gradient,) = torch.autograd.grad(s.sum(), x)
    use_fused_kernels(False)
    wide = x.detach().double().requires_grad_()
    exact = ShrunkSinh.apply(wide, 1.7, b, levels, 1.3, floor, None if offset is None else offset.double())
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    same = (s.double() - exact).abs() < 1e-6 * exact.abs() + 1e-6
    assert same.float().mean() > (0.99 if levels else 0.9999)  # half-way between two codes, rounding decides
    torch.testing.assert_close(gradient.double()[same], slope[same], rtol=1e-5, atol=1e-6)


def test_chips(tiny_bert, monkeypatch):
    batch = bert_batch()
    patch_model(tiny_bert.eval(), ReRAMConfig(dac_bits=8))
    calibrate(tiny_bert, [batch])

    @torch.no_grad()
    def chip():
        with deploy(tiny_bert, "1y", seed=3):
            return tiny_bert(**batch).loss

    eager, compiled, ran = both(chip, monkeypatch)
    assert "_rounded_sinh" in ran
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_training_after_inference(tiny_bert, monkeypatch):
    batch = bert_batch()
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="none", adc_bits=8))
    calibrate(tiny_bert, [batch])

    def run():
        with torch.inference_mode():
            tiny_bert(**batch)
        return step(tiny_bert, batch)

    eager, compiled, ran = both(run, monkeypatch)
    assert {"_sinh", "_slope", "_quantize"} <= ran
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-6)


def test_what_has_no_kernel_goes_its_usual_way(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(5, 8)
    patch_model(model, ReRAMConfig(retention_loss="none", learn_input_range=True))
    calibrate(model, [x])
    for run in (model, copy.deepcopy(model).double()):
        y = x.to(next(run.parameters()).dtype)
        eager, compiled, _ = both(lambda run=run, y=y: step(run, y), monkeypatch)
        for name, gradient in eager[1].items():
            torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        use_fused_kernels(False)
        monkeypatch.undo()


def test_without_a_compiler_they_stay_off(monkeypatch):
    def refuse(device):
        raise OSError("no c++")

    monkeypatch.setattr(fused, "_try_out", refuse)
    with pytest.raises(RuntimeError, match=r"fused kernels cannot be compiled here: no c\+\+"):
        use_fused_kernels()
    assert fused.twin(torch.ones(2)) is None
