"""Each token's largest magnitude as its input range, each image's for convolutions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    noise_to_signal,
    patch_model,
)
from hf_reram.nn.ops import cpu, reference
from hf_reram.nn.ops.functions import RowSinh
from tests.samples.devices import SILENT, device, straight
from tests.samples.layers import KINDS, layer_of
from tests.samples.models import bert_batch

F64 = torch.float64


def uneven(x: torch.Tensor, kind, decades: float = 3.0) -> torch.Tensor:
    """Tokens (images) of very different sizes."""
    vectors = x.shape[:-1] if isinstance(kind, str) else x.shape[:1]
    sizes = torch.logspace(1 - decades, decades, math.prod(vectors))
    return x * sizes.view(*vectors, *[1] * (x.dim() - len(vectors)))


def peaks_of(x: torch.Tensor, kind) -> torch.Tensor:
    return x.abs().amax(-1, True) if isinstance(kind, str) else x.abs().amax(tuple(range(1, x.dim())), True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_each_token_is_bent_in_its_own_units(kind, training):
    """``y = W peak phi(x / peak) + bias`` with phi from its formula."""
    torch.manual_seed(0)
    layer, x = layer_of(kind)
    x = uneven(x, kind)
    twin = copy.deepcopy(layer).double()
    model = nn.Sequential(layer).train(training)
    patch_model(model, ReRAMConfig(input_range="per_token", weight_clip=None, range_shrink=1.0, center_inputs=False))
    calibrate(model, [x])
    assert bool(layer.per_token) and float(layer.input_range) == 1.0 and not layer.centered
    now = layer.scalars()
    peak = peaks_of(x, kind).double()
    phi = peak * now.gain / now.b * torch.sinh(now.b * x.double() / peak)
    expected = twin(phi)
    scale = expected.detach().abs().reshape(len(expected), -1).amax(1).clamp(min=1e-9)
    error = ((model(x) - expected).abs().reshape(len(expected), -1).amax(1) / scale).max()
    assert float(error) < 2e-5
    assert float((model(x) - twin(x.double())).norm() / expected.norm()) > 1e-3  # the curve is there


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_on_a_straight_device_nothing_changes(kind, offset):
    torch.manual_seed(0)
    layer, x = layer_of(kind)
    x = (uneven(x, kind) + offset).requires_grad_()
    model = nn.Sequential(layer).train()
    expected = model(x)
    mark = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    wanted = torch.autograd.grad((expected * mark).sum(), [x, layer.weight])
    patch_model(model, straight(input_range="per_token"))
    calibrate(model, [x.detach()])
    y = model(x)
    found = torch.autograd.grad((y * mark).sum(), [x, layer.weight])
    for a, b in zip((y, *found), (expected, *wanted)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("shrink", "options"), [(1.0, {}), (0.2, {"equalize_inputs": True})], ids=str)
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_gradients_are_exact(kind, shrink, options, offset):
    """The peak's own among them."""
    torch.manual_seed(0)
    layer, x = layer_of(kind)
    x = x[:2, :3] if kind in ("linear", "conv1d") else x[:2, :, :5, :6] if x.dim() == 4 else x[:2, :, :9]
    x = uneven(x, kind, 0.5) + offset
    model = nn.Sequential(layer).train()
    config = ReRAMConfig(device=device(v0=0.1), input_range="per_token", range_shrink=shrink, **options)
    patch_model(model, config)
    calibrate(model, [x])
    model.double()
    assert gradcheck(model, (x.double().requires_grad_(),), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("b", [1e-5, 0.02, 0.3, 0.8, 0.81, 3.0, 6.0])
@pytest.mark.parametrize(("levels", "floor"), [(0, -1.0), (127, -1.0), (127, -0.25)])
@pytest.mark.parametrize("offset", [None, torch.linspace(-1, 1, 40)])
def test_cpu_pieces_compute_as_defined(monkeypatch, b, levels, floor, offset):
    monkeypatch.setattr(cpu, "ELEMENTS", 130)  # several pieces, the last one shorter
    x = torch.randn(11, 40) * torch.logspace(-3, 3, 11)[:, None]
    x[5] = 0.0 if offset is None else offset
    gain, grad = 0.9, torch.randn(11, 40)
    peak, top = reference.peaks(x, offset)
    expected = reference.row_sinh(x.double(), None if offset is None else offset.double(), peak.double(), b, gain,
                                  levels, floor)  # fmt: skip
    s, found, where = cpu.row_sinh(x, offset, b, gain, levels, floor, True)
    torch.testing.assert_close(found, peak)
    assert torch.equal(where, top)
    unit = gain * (b if b < 1e-4 else math.sinh(b))
    if b < 1e-4:
        unit = gain
    torch.testing.assert_close((s / peak).double(), expected / peak, rtol=0, atol=(2e-6 if not levels else 0.02) * unit)
    wanted = reference.row_sinh_gradient(grad.double(), s.double(), peak.double(), top, b, gain, floor)
    slopes = cpu.row_sinh_gradient_(grad.clone(), s, peak, top, b, gain, floor)
    torch.testing.assert_close(slopes.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("keep_input", [True, False])
def test_what_is_saved_makes_no_difference(keep_input):
    """Beside an adapter x is saved in place of s."""
    x = torch.randn(6, 9, dtype=F64, requires_grad=True)
    offset = torch.linspace(-1, 1, 9, dtype=F64)
    keep = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=F64)

    def both(x):
        s, _, power = RowSinh.apply(x, 0.5, 0, 1.1, -1.0, offset, False, keep_input, True, keep)
        return s, power

    assert gradcheck(both, (x,))
    s, power = both(x)
    torch.testing.assert_close(power, (s.square() * keep[:, None]).sum(0))


def test_read_noise_and_adc_steps_grow_with_the_token():
    torch.manual_seed(0)
    x = torch.randn(4, 32).repeat_interleave(3000, 0) * torch.tensor([0.01, 1.0, 30.0, 1e4]).repeat_interleave(
        3000
    ).view(-1, 1)
    model = nn.Sequential(nn.Linear(32, 3))
    cell = device(read_noise=0.2, retention=SILENT)
    patch_model(model, ReRAMConfig(device=cell, input_range="per_token", weight_clip=None, center_inputs=False))
    calibrate(model, [x])
    layer = model[0]
    with torch.no_grad():
        clean = model.eval()(x)
        with deploy(model, "1s"):
            noise = (model(x) - clean).view(4, 3000, 3)
    now = layer.scalars()
    unit = x.view(4, 3000, 32)[:, :1].abs().amax(2) * now.gain * cell.b() / now.b  # (4, 1)
    std = unit * layer.weight_scale * 0.2 / (cell.read_voltage * (cell.g_max - cell.g_min) * math.sinh(1e-9) / 1e-9)
    ratio = noise.std(1) / std
    assert float(ratio.std() / ratio.mean()) < 0.05  # proportional to the token's size and the column's scale
    config = ReRAMConfig(device=device(read_noise=0.0), input_range="per_token", adc_bits=6, center_inputs=False)
    model = nn.Sequential(nn.Linear(32, 3, bias=False))
    patch_model(model, config)
    calibrate(model, [x])
    layer, now = model[0], model[0].scalars()
    step = x.abs().amax(1, True) * now.gain * config.device.b() / now.b * layer.weight_scale * layer.adc_range / 31
    codes = model.eval()(x) / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert 3 < float(codes.abs().max()) <= 31.001
    with torch.no_grad():
        error = (model(x) - nn.functional.linear(x, layer.weight)).view(4, 3000, 3)[:, 0].norm(dim=1)
    relative = error / nn.functional.linear(x, layer.weight).detach().view(4, 3000, 3)[:, 0].norm(dim=1)
    assert float(relative.max()) < 0.4


@pytest.mark.parametrize("kind", ["linear", KINDS[3]], ids=str)
def test_closed_form_is_what_chips_show(kind):
    torch.manual_seed(0)
    layer, x = layer_of(kind)
    x = uneven(x, kind)
    model = nn.Sequential(layer)
    cell = device(read_noise=0.0)
    patch_model(model, ReRAMConfig(device=cell, input_range="per_token", retention_loss="output"))
    calibrate(model, [x])
    add_retention_loss(model.train()(x).sum() * 0, model)
    expected = noise_to_signal(model)["0"]
    model.eval()
    with torch.no_grad():
        clean = model(x)
        signal = clean if layer.bias is None else clean - layer.over_channels(layer.bias)
        if layer.centered:
            pytest.skip("the output's power is then that without the offset")
        powers = []
        for seed in range(300):
            with deploy(model, "1d", seed=seed):
                powers.append(float((model(x) - clean).square().sum() / signal.square().sum()))
    spread = torch.tensor(powers)
    assert float(spread.mean()) == pytest.approx(expected, abs=4 * float(spread.std()) / math.sqrt(len(powers)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shrink", [1.0, 1e-4])
def test_half_precision(dtype, shrink):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    x = (torch.randn(40, 24) * torch.logspace(-2, 3, 40)[:, None]).to(dtype)
    model.to(dtype).float()
    patch_model(model, ReRAMConfig(input_range="per_token", range_shrink=shrink))
    calibrate(model, [x.float()])
    results = []
    for m, t in ((model, x.float()), (copy.deepcopy(model).to(dtype), x.clone())):
        t = t.detach().requires_grad_()
        y = m.train()(t)
        (y.float() * torch.linspace(-1, 1, 16)).sum().backward()
        results.append((y.detach().float(), t.grad.float()))
    eps = torch.finfo(dtype).eps
    for found, wanted in zip(results[1], results[0]):
        assert torch.isfinite(found).all()
        error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(error.max()) < 20 * eps


def test_tokens_of_zeros_and_layers_that_are_not_calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).train()
    patch_model(model, ReRAMConfig(input_range="per_token", range_shrink=0.3, weight_clip=None))
    x = torch.randn(3, 8)
    x[1] = 0.0
    x.requires_grad_()
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y[1], model[0].bias)
    assert torch.isfinite(x.grad).all() and x.grad[1].abs().max() > 0
    assert not model[0].calibrated
    alone = torch.cat([model(row[None]) for row in x.detach()])  # no token's range depends on another's
    torch.testing.assert_close(alone, y)


def test_the_config_in_its_forms():
    assert ReRAMConfig(learn_input_range=True).input_range == "learned"
    assert ReRAMConfig(learn_input_range=False).input_range == ReRAMConfig().input_range
    with pytest.raises(ValueError, match=r"input_range='per_channel'.*per_token"):
        ReRAMConfig(input_range="per_channel")
    with pytest.raises(ValueError, match="learn_input_range"):
        ReRAMConfig(input_range="per_token", learn_input_range=True)
    data = ReRAMConfig(input_range="per_token").to_dict()
    assert ReRAMConfig.from_dict(data).input_range == "per_token"
    for learned, meant in ((True, "learned"), (False, "static")):  # as version 2 said it
        old = {k: v for k, v in data.items() if k != "input_range"} | {"version": 2, "learn_input_range": learned}
        assert ReRAMConfig.from_dict(old).input_range == meant


def test_save_and_load(tiny_bert, tmp_path):
    patch_model(tiny_bert, ReRAMConfig(input_range="per_token"))
    calibrate(tiny_bert.eval(), [bert_batch()])
    expected = tiny_bert(**bert_batch()).logits
    tiny_bert.save_pretrained(tmp_path)
    loaded = type(tiny_bert).from_pretrained(tmp_path).eval()
    assert all(layer.scalars().per_token for layer in crossbar_layers(loaded).values())
    torch.testing.assert_close(loaded(**bert_batch()).logits, expected)
    with deploy(loaded, "1d", seed=1), deploy(tiny_bert, "1d", seed=1):
        torch.manual_seed(0)
        a = loaded(**bert_batch()).logits
        torch.manual_seed(0)
        torch.testing.assert_close(a, tiny_bert(**bert_batch()).logits)
