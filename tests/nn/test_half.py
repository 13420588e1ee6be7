"""Half precision, and the gradients of converters."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, add_retention_loss, calibrate, deploy, patch_model, sampled_drift
from hf_reram.nn.ops.functions import OutputPower, Quantize, ShrunkSinh
from tests.samples.devices import SILENT, device

HALVES = [torch.float16, torch.bfloat16]


def pair(dtype: torch.dtype, size: float, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A calibrated layer in half precision and the same in float32, and inputs."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(24, 16)).eval()
    x = (size * torch.randn(64, 24)).to(dtype).float()
    wide.to(dtype).float()  # the same weights
    patch_model(wide, ReRAMConfig(**options))
    calibrate(wide, [x])
    return copy.deepcopy(wide).to(dtype), wide, x


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"adc_bits": 8}, {"tile_size": 8}], ids=str)
@pytest.mark.parametrize("shrink", [1.0, 1e-2])
def test_read_noise_has_the_spread_that_it_has_in_float32(shrink, options, dtype):
    """Its unit is beyond 256 here, whose square float16 does not hold."""
    cell = device(read_noise=0.1, retention=SILENT)
    half, wide, x = pair(dtype, 300.0, device=cell, range_shrink=shrink, weight_clip=None, **options)
    x = x.clamp(-600, 600)
    with torch.no_grad():
        clean = wide(x)
        with deploy(half, "1s"), deploy(wide, "1s"):
            noises = [m(t).float() - clean for m, t in ((wide, x), (half, x.to(dtype)))]
    assert torch.isfinite(noises[1]).all()
    assert float(noises[1].std() / noises[0].std()) == pytest.approx(1, abs=0.1)


CONVERTERS = {"dac_bits": 8, "adc_bits": 8}
LEARNED = {"input_range": "learned"}
CASES = [
    (0.2, shrink, options)
    for shrink in (1e-6, 1e-3, 1.0)
    for options in ({}, CONVERTERS, LEARNED, CONVERTERS | LEARNED)
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"adc_bits": 8}], ids=str)
def test_a_tokens_own_range_may_be_all_that_half_precision_holds(options, dtype):
    """The unit of current is the range over the shrink, beyond float16's largest number."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 8, bias=False)).eval()
    x = torch.randn(64, 16)
    x[:4, 3] = 6e4
    with torch.no_grad():
        wide[0].weight.mul_(0.1)
    wide.to(dtype).float()
    patch_model(wide, ReRAMConfig(device=device(v0=0.1), input_range="per_token", range_shrink=0.3, **options))
    calibrate(wide, [x])
    half = copy.deepcopy(wide).to(dtype)
    with torch.no_grad(), deploy(half, "1s", seed=0), deploy(wide, "1s", seed=0):
        found, expected = half(x.to(dtype)).float(), wide(x)
    # Read noise is drawn anew in each.
    assert torch.isfinite(found).all() and found[:4].abs().amax() > 1000
    assert float((found - expected)[:4].norm() / expected[:4].norm()) < 0.3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("voltage", "shrink", "options"), [*CASES, (3.2, 1.0, {}), (4.9, 1.0, {}), (3.2, 1.0, LEARNED)], ids=str
)
def test_outputs_and_gradients_are_those_of_float32(voltage, shrink, options, dtype):
    """Also where the sinh of float16 would overflow, and steps and gains of small shrinks would be 0."""
    cell = device(read_voltage=voltage, v0=0.25, read_noise=0.0)
    half, wide, x = pair(dtype, 3.0, device=cell, range_shrink=shrink, weight_clip=None, **options)
    results = []
    for model, t in ((wide, x), (half, x.to(dtype))):
        t = t.detach().requires_grad_()
        y = model(t)
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        span = [] if model[0].input_range.grad is None else [model[0].input_range.grad]
        results.append([r.float() for r in (y.detach(), t.grad, model[0].weight.grad, *span)])
    for found, wanted in zip(*reversed(results)):
        assert torch.isfinite(found).all()
        assert float((found - wanted).norm()) <= (0.15 if "dac_bits" in options else 0.05) * float(wanted.norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("voltage", "shrink"), [(3.2, 1.0), (0.2, 1e-3), (0.2, 2e-2)])
def test_a_learned_range_is_read_like_a_fixed_one(voltage, shrink, dtype):
    """Whatever the inputs' size, outputs, gradients and R are those of the fixed range that it starts from."""
    results = []
    for kind in ("static", "learned"):
        cell = device(read_voltage=voltage, v0=0.25, read_noise=0.0)
        half, _, x = pair(dtype, 300.0, device=cell, range_shrink=shrink, input_range=kind, retention_loss="output")
        t = x.to(dtype).requires_grad_()
        y = half.train()(t)
        loss, term = add_retention_loss((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), half)
        loss.backward()
        results.append([r.detach().float() for r in (y, term, t.grad, half[0].weight.grad)])
    for wanted, found in zip(*results):
        assert torch.isfinite(found).all()
        assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_the_top_code_of_the_dac_has_a_gradient():
    """What is beyond the range has none, although it has the same code."""
    x = torch.tensor([-1.3, -1.0, -0.999, -0.5, 0.0, 0.5, 0.999, 1.0, 1.0001], requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        for frozen in (False, True):
            t = x.detach().to(dtype).requires_grad_()
            s = ShrunkSinh.apply(t, 1.0, 0.8, 7, 1.0, -1.0, None, False, frozen)
            (grad,) = torch.autograd.grad(s.sum(), t)
            wanted = (0.8 * torch.cosh(torch.asinh(s.detach()))) * torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0])
            torch.testing.assert_close(grad, wanted)


def test_one_sided_dacs_pass_gradients_to_zeros():
    x = torch.tensor([-0.1, 0.0, 0.01, 0.9999, 1.0, 1.1], requires_grad=True)
    s = ShrunkSinh.apply(x, 1.0, 0.5, 15, 1.0, 0.0)
    (grad,) = torch.autograd.grad(s.sum(), x)
    assert (grad > 0).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_adc_that_saturates_has_no_gradient(dtype):
    y = torch.tensor([-9.0, -7.5, -7.4, 0.2, 3.0, 7.4, 7.6, 30.0], dtype=dtype, requires_grad=True)
    bias = torch.zeros(8, dtype=dtype, requires_grad=True)
    result = Quantize.apply(y * 1.0, torch.ones(8, dtype=dtype), 7, bias, False)
    of_y, of_bias = torch.autograd.grad(result.sum(), (y, bias))
    assert of_y.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert of_bias.tolist() == [1] * 8
    assert result.tolist() == [-7, -7 if dtype == torch.bfloat16 else round(-7.5 + 0.01), -7, 0, 3, 7, 7, 7]


@pytest.mark.parametrize("loss", ["drift", "output", "output+drift"])
@pytest.mark.parametrize("way", ["bf16 autocast", "fp16 autocast", "fp16"])
def test_one_step_in_half_precision(way, loss):
    """Gradients of the sum of task and retention loss, against those of float32: their direction and their size."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x, target = torch.randn(128, 32), torch.randint(8, (128,))
    patch_model(wide, ReRAMConfig(retention_loss=loss, dac_bits=8, adc_bits=8))
    calibrate(wide, [x])
    gradients = []
    for model, dtype in ((wide, None), (copy.deepcopy(wide), torch.bfloat16 if "bf16" in way else torch.float16)):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**12)
        if way == "fp16" and dtype is not None:
            model.half()
        with sampled_drift(model, seed=1), torch.autocast("cpu", dtype, enabled="auto" in way and dtype is not None):
            logits = model(x.half() if way == "fp16" and dtype is not None else x)
            loss_of, _ = add_retention_loss(nn.functional.cross_entropy(logits.float(), target), model)
        scaler.scale(loss_of).backward()
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        gradients.append([p.grad.float() / scale for p in model.parameters()])
    for wanted, found in zip(*gradients):
        assert torch.isfinite(found).all()
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
        assert float(found.norm() / wanted.norm()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_weights_at_their_edge_keep_the_gradient_of_the_mean_shift(dtype, clip):
    """Of a shift that is proportional to the weights R does not depend on them, wherever rounding takes their edge."""
    cell = device(g_min=1.0, read_noise=0.0, programming=[0.0], retention={"type": "generic", "A": 0.02, "s0": 0.0})
    _, model, x = pair(dtype, 1.0, device=cell, retention_loss="weight", weight_clip=clip)
    model = model.to(dtype).train()
    loss, term = add_retention_loss(model(x.to(dtype)).float().sum() * 0, model, 1e3)
    loss.backward()
    weight, grad = (t.detach().float() for t in (model[0].weight, model[0].weight.grad))
    alone = 2e3 * float(term) * weight.abs() / weight.square().sum()  # what of it the signal alone gives
    assert float(term) == pytest.approx((0.02 * math.log1p(86400)) ** 2, rel=0.02)
    assert float((grad.abs() / alone.clamp(min=float(alone.mean()))).max()) < 0.02


@pytest.mark.parametrize("dtype", HALVES)
def test_amounts_below_what_half_precision_holds_count_in_gradients_of_powers(dtype):
    """As where GradScaler's 65536 is spread over many tokens; the products are of a size that it holds."""
    y = torch.linspace(-300, 300, 64, dtype=dtype).view(8, 8).requires_grad_()
    bias, keep = torch.ones(8, dtype=dtype), torch.tensor([1.0] * 6 + [0.0] * 2)
    same, power = OutputPower.apply(y, bias, keep)
    (0.0 * same.float().sum() + 1e-8 * power).backward()
    wanted = 2e-8 * (y.detach().double() - 1) * keep[:, None]
    assert float((y.grad.double() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_range": "per_token", "redundancy": 0.3},
        {"retention_loss": "sensitivity", "adc_bits": 8, "dac_bits": 8},
        {"tile_size": 8, "weight_scale": "per_tile", "equalize_inputs": True},
    ],
    ids=str,
)
def test_pytorchs_default_dtype_changes_no_number(options, default):
    found = []
    for dtype in (torch.float32, default):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.randn(32, 16)
        torch.set_default_dtype(dtype)
        try:
            calibrate(patch_model(model, ReRAMConfig(**options)), [x])
            with torch.no_grad(), deploy(model.eval(), "1d", seed=0):
                chip = model(x)
            with sampled_drift(model.train(), seed=1):
                loss, _ = add_retention_loss(model(x).square().mean(), model)
            loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((chip, loss, model[0].weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
