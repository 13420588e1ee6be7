import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hf_reram import DeviceConfig
from hf_reram.config import dac_grid
from hf_reram.device.iv import cell_current, full_scale_gain, least_squares_gain, sinh_coefficients, uniform_gain
from hf_reram.device.moments import Curve, weight_error
from hf_reram.nn.ops import cpu, reference
from hf_reram.nn.ops.functions import (
    DriftedWeight,
    OffsetOutput,
    OutputPower,
    Quantize,
    ShrunkSinh,
    WeightVariance,
    clip_weight,
)
from hf_reram.nn.ops.reference import weight_mean

F64 = torch.float64


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 6.0), st.floats(-12, 12).map(lambda e: 10.0**e), st.integers(0, 2**31))
def test_sinh_is_exact_to_float32(b, span, seed):
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * span
    exact = torch.sinh(b * (x.double() / span).clamp(-1, 1))
    gained = ShrunkSinh.apply(x, span, b, 0, span / b)  # phi, of the size of x
    torch.testing.assert_close(gained.double(), exact * span / b, rtol=1e-6, atol=1e-7 * math.sinh(b) * span / b)
    torch.testing.assert_close(ShrunkSinh.apply(x, span, b, 0).double(), exact, rtol=1e-6, atol=1e-7 * math.sinh(b))


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 4.0), st.floats(-30, 30).map(lambda e: 10.0**e))
def test_sinh_gradient_at_any_input_range(b, span):
    x = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * span).requires_grad_()
    phi = ShrunkSinh.apply(x, span, b, 0, span / b)
    phi.sum().backward()
    u = x.detach().double() / span
    slope = torch.where(u.abs() < 1, torch.cosh(b * u), 0.0)
    torch.testing.assert_close(x.grad.double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b", [1e-5, 0.3, 1.0, 2.5, 7.0])
def test_sinh_gradients_for_input_and_range(b):
    x = torch.randn(40, dtype=F64, requires_grad=True)
    span = torch.tensor([1.3], dtype=F64, requires_grad=True)
    assert gradcheck(lambda x: ShrunkSinh.apply(x, 1.3, b, 0), (x,))
    assert gradcheck(lambda x: ShrunkSinh.apply(x, 1.3, b, 0, 2.5), (x,))
    assert gradcheck(lambda x, r: ShrunkSinh.apply(x, r, b, 0), (x, span))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "span"), [(1e-5, 2.0), (0.3, 900.0), (2.5, 1e-2), (8.0, 2.0)])
def test_gradients_of_a_learned_range_in_pieces_and_in_half_precision(monkeypatch, dtype, b, span):
    """Against autograd of the formula in float64."""
    monkeypatch.setattr(cpu, "ELEMENTS", 100)
    x = (0.7 * span * torch.randn(31, 9)).to(dtype).requires_grad_()
    learned, weight = torch.tensor([span], requires_grad=True), torch.randn(31, 9).to(dtype)
    gain = 1.0 if b < 1e-4 else 1 / math.sinh(b)
    found = torch.autograd.grad((ShrunkSinh.apply(x, learned, b, 0, gain) * weight).sum(), (x, learned))
    wide, r = x.detach().double().requires_grad_(), torch.tensor([span], dtype=F64, requires_grad=True)
    u = (wide / r).clamp(-1, 1)
    exact = r * gain * (u if b < 1e-4 else torch.sinh(b * u))
    for one, other in zip(found, torch.autograd.grad((exact * weight.double()).sum(), (wide, r))):
        assert float((one.double() - other).norm() / other.norm()) < (1e-5 if dtype == torch.float32 else 0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.floats(-1, 0))
def test_a_dac_uses_its_codes_and_no_more(bits, floor):
    levels, lowest = dac_grid(bits, floor)
    codes = levels + round(-lowest * levels) + 1
    assert 2**bits - 3 <= codes <= 2**bits
    assert lowest <= floor + 1e-9 and lowest * levels == pytest.approx(round(lowest * levels))
    assert dac_grid(bits, -1.0) == (2 ** (bits - 1) - 1, -1.0)


@pytest.mark.parametrize("b", [1e-5, 0.8, 6.0])
@pytest.mark.parametrize("floor", [0.0, -0.1, -1.0])
def test_one_sided_inputs_are_driven_and_clipped_on_their_side(b, floor):
    levels, lowest = dac_grid(6, floor)
    x = torch.linspace(-2.00031, 1.99977, 3989, requires_grad=True)  # no value half way between two codes
    s = ShrunkSinh.apply(x, 1.6, b, levels, 1.0, lowest)
    s.sum().backward()
    u = (x.detach().double() / 1.6).clamp(lowest, 1)
    u = (u * levels).round() / levels
    expected = u if b < 1e-4 else torch.sinh(b * u)
    torch.testing.assert_close(s.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert not x.grad[(x < 1.6 * lowest - 0.1) | (x > 1.7)].any() or lowest == 0
    assert bool((x.grad[(x > 0.1) & (x < 1.5)] > 0).all())


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5), (600, 700)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_pieces_agree_with_the_definition_in_float64(shape, layout):
    x = torch.randn(shape)
    if layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 1)
    grad = torch.randn_like(x)
    x32, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    for t, g in ((x32, grad), (x64, grad.double())):
        (ShrunkSinh.apply(t, 1.5, 0.8, 0, 1.7) * g).sum().backward()
    torch.testing.assert_close(x32.grad, x64.grad.float(), rtol=1e-5, atol=1e-6)


def test_sinh_saves_a_single_tensor():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ShrunkSinh.apply(torch.randn(8, requires_grad=True), 1.0, 0.5, 0)
    assert len(saved) == 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("b", [1e-5, 0.8])
@pytest.mark.parametrize("levels", [0, 31])
def test_an_input_may_be_kept_and_a_gradient_overwritten(dtype, b, levels):
    values, offset, out = torch.randn(50, 6, dtype=dtype), torch.randn(6, dtype=dtype), torch.randn(50, 6, dtype=dtype)
    found = []
    for keep_input, in_place in ((False, False), (True, False), (True, True), (False, True)):
        x, grad = values.clone().requires_grad_(), out.clone()
        s = ShrunkSinh.apply(x, 1.3, b, levels, 0.7, -0.5, offset, in_place, keep_input)
        s.backward(grad)  # a matrix product hands over a gradient of its own, as this is
        found.append(x.grad)
        assert in_place or torch.equal(grad, out)
    assert found[0].any() and all(torch.equal(found[0], other) for other in found[1:])


def test_clamped_inputs_get_no_gradient():
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    ShrunkSinh.apply(x, 1.0, 0.5, 0).sum().backward()
    assert x.grad[0] == x.grad[3] == 0
    assert x.grad[1] > 0


def test_dac_has_its_number_of_levels():
    s = ShrunkSinh.apply(torch.linspace(-1, 1, 1001), 1.0, 1e-5, 7)
    assert len(s.unique()) == 15


@pytest.mark.parametrize("b", [0.04, 0.3, 1.0, 2.0])
def test_gains(b):
    u = torch.linspace(-1, 1, 20001, dtype=F64)
    assert full_scale_gain(b) * math.sinh(b) == pytest.approx(1)
    assert uniform_gain(b) == pytest.approx(least_squares_gain(u, torch.ones_like(u), b), rel=1e-3)
    torch.testing.assert_close(cell_current(10.0, 0.2, 0.25), torch.tensor(10 * 0.25 * math.sinh(0.8)))
    assert len(sinh_coefficients(b)) >= 2


def curve(*coefficients: float) -> Curve:
    """A polynomial, lowest power first."""
    return Curve(torch.from_numpy(np.polyval(coefficients[::-1], np.linspace(0, 1, 513))))


SPREADS = [curve(0.2), curve(0.2, 0.3, -0.1)]
MEANS = [None, curve(0.0, -0.1, 0.2)]


def test_curves_are_looked_up():
    a = torch.rand(50, 3, dtype=F64)
    value, slope = reference.looked_up(SPREADS[1].table(a), a)
    torch.testing.assert_close(value, 0.2 + 0.3 * a - 0.1 * a**2, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(slope, 0.3 - 0.2 * a, rtol=2e-3, atol=0.0)
    edges = torch.tensor([0.0, 1.0, float("nan")])
    table = SPREADS[1].table(edges)
    for value, slope in (reference.looked_up(table, edges), cpu.Lookup((table,), (3,), True).at(edges)[0]):
        torch.testing.assert_close(value, torch.tensor([0.2, 0.4, float("nan")]), equal_nan=True)
        torch.testing.assert_close(slope[:2], torch.tensor([0.3, 0.1]), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("spread", SPREADS)
def test_weight_functions_have_right_gradients(spread):
    weight = torch.randn(6, 5, dtype=F64, requires_grad=True)
    scale = torch.rand(6, 1, dtype=F64) + 0.5
    std = spread.table(scale)
    assert gradcheck(lambda w: clip_weight(w, scale), (weight,))
    assert gradcheck(lambda w: WeightVariance.apply(clip_weight(w, scale), scale, std), (weight,))


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("spread", SPREADS)
def test_drifted_weight_has_right_values_and_gradients(mean, spread):
    weight = torch.randn(6, 5, dtype=F64, requires_grad=True)
    noise = torch.randn(6, 5, dtype=F64)
    scale = torch.rand(6, 1, dtype=F64) + 0.5
    tables = spread.table(scale), None if mean is None else mean.table(scale)
    assert gradcheck(lambda w: DriftedWeight.apply(clip_weight(w, scale), scale, noise, *tables, True), (weight,))
    assert gradcheck(lambda w: DriftedWeight.apply(clip_weight(w, scale), scale, noise, *tables)[0], (weight,))
    held = clip_weight(weight, scale)
    variance = WeightVariance.apply(held, scale, tables[0])
    wanted = held + variance.sqrt() * noise
    wanted = wanted if mean is None else wanted + weight_mean(held, scale, tables[1])
    drifted, found = DriftedWeight.apply(held, scale, noise, *tables, True)
    torch.testing.assert_close(drifted, wanted)
    torch.testing.assert_close(found, variance)


@pytest.mark.parametrize("shape", [(6, 5), (700, 900), (3, 4, 5, 2)], ids=str)
@pytest.mark.parametrize("per", ["row", "column", "all"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("copied", [None, 0, 1])
def test_cells_in_pieces_agree_with_the_definition(shape, per, spread, mean, copied):
    """As whole tensors in float64; slopes are those of the interval, so that rounding may choose the next one's."""
    sizes = {"row": (shape[0], *[1] * (len(shape) - 1)), "column": (shape[-1],), "all": (1,) * len(shape)}
    scale, noise = torch.rand(sizes[per]) + 0.5, torch.randn(shape)
    copies = None
    if copied is not None:
        copies = torch.randint(1, 4, [n if d == copied else 1 for d, n in enumerate(shape)]).float()
    held = scale if copies is None else scale * copies
    weight, out = torch.randn(shape).clamp(-held, held), torch.randn(shape)
    wide = [t.double() for t in (weight, scale, noise, out)]
    wide_copies = None if copies is None else copies.double()
    tables = [(spread.table(t), None if mean is None else mean.table(t)) for t in (weight, wide[0])]
    pairs = [
        *zip(
            cpu.drifted_weight(weight, scale, noise, *tables[0], True, True, copies),
            reference.drifted_weight(*wide[:3], *tables[1], True, True, wide_copies),
        ),
        (
            cpu.weight_variance(weight, held, tables[0][0]),
            reference.weight_variance(wide[0], held.double(), tables[1][0]),
        ),
        (
            cpu.weight_variance_gradient(out, weight, scale, tables[0][0], copies),
            reference.weight_variance_gradient(wide[3], *wide[:2], tables[1][0], wide_copies),
        ),
    ]
    for i, (found, wanted) in enumerate(pairs):
        tolerance = {"rtol": 1e-5, "atol": 2e-3} if i in (1, 4) else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found.double(), wanted, **tolerance)
    assert cpu.all_within(weight, scale, copies)
    weight.flatten()[-1] = 100.0
    assert not cpu.all_within(weight, scale, copies)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mean", MEANS)
def test_copies_of_rows_hold_shares_whose_errors_are_independent(spread, mean):
    """Against k cells that each hold a kth of the weight, and gradients of it."""
    torch.manual_seed(0)
    copies = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    scale, noise = torch.rand(6, 1, dtype=F64) + 0.5, torch.randn(6, 3, dtype=F64)
    weight = (torch.randn(6, 3, dtype=F64).clamp(-0.9, 0.9) * scale * copies).requires_grad_()
    tables = spread.table(weight), None if mean is None else mean.table(weight)
    drifted, variance = DriftedWeight.apply(weight, scale, noise, *tables, True, copies)
    share = weight / copies  # of each cell
    _, of_one = DriftedWeight.apply(share, scale, noise, *tables, True)
    torch.testing.assert_close(variance, copies * of_one)
    shift = 0.0 if mean is None else reference.weight_mean(share, scale, tables[1])
    torch.testing.assert_close(drifted, weight + copies * shift + (copies * of_one).sqrt() * noise)
    assert gradcheck(lambda w: DriftedWeight.apply(w, scale, noise, *tables, True, copies), (weight,))


KEEPS = [None, torch.tensor([1, 1, 0, 1, 0, 1, 1.0], dtype=F64)]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("inner", [(), (3, 2)])
def test_output_power(keep, inner):
    clean = torch.randn(7, 5, *inner, dtype=F64, requires_grad=True)
    bias = torch.randn(5, *[1] * len(inner), dtype=F64, requires_grad=True)

    def power(clean, bias):
        y, total = OutputPower.apply(clean + bias.detach(), bias, keep)
        return 0.3 * total + 0.1 * y.pow(3).sum()

    def plain(clean, bias):
        kept = clean if keep is None else clean * keep.view(-1, *[1] * (clean.dim() - 1))
        return 0.3 * kept.square().sum() + 0.1 * (clean + bias).pow(3).sum()

    expected = torch.autograd.grad(plain(clean, bias), (clean, bias))
    torch.testing.assert_close(torch.autograd.grad(power(clean, bias), (clean, bias)), expected)
    torch.testing.assert_close(power(clean, bias), plain(clean, bias))
    small = [t.detach().float().requires_grad_() for t in (clean, bias)]
    keep32 = None if keep is None else keep.float()
    y, total = OutputPower.apply(small[0] + small[1].detach(), small[1], keep32)
    found = torch.autograd.grad(0.3 * total + 0.1 * y.pow(3).sum(), small)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("inner", [(), (3, 2)])
@pytest.mark.parametrize("b", [1e-5, 0.5, 6.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_input_power(keep, inner, b, in_place):
    """Of the examples that count, with its gradient beside that of s; in pieces and as the definition has it."""
    values, weight = torch.randn(7, 5, *inner, dtype=F64), torch.randn(5, *inner, dtype=F64)
    span = torch.tensor([1.3], dtype=F64, requires_grad=True)
    channel_dim = -1 - len(inner)
    rows = slice(None) if keep is None else keep.bool()

    def loss(x, span, dtype=F64):
        kept = None if keep is None else keep.to(dtype)
        s, power = ShrunkSinh.apply(x, span, b, 0, 0.7, -1.0, None, in_place, False, channel_dim, kept)
        return (weight.to(dtype) * power).sum() + (s * s.detach().square()).sum() / 3, s, power

    x = values.clone().requires_grad_()
    total, s, power = loss(x, 1.3)
    torch.testing.assert_close(power, s[rows].square().sum(0))
    (found,) = torch.autograd.grad(total, x)
    if not in_place:
        assert gradcheck(lambda x, span: loss(x, span)[2], (x, span))
    again = values.clone().requires_grad_()
    s = ShrunkSinh.apply(again, 1.3, b, 0, 0.7)
    (wanted,) = torch.autograd.grad(
        (weight * s[rows].square().sum(0)).sum() + (s * s.detach().square()).sum() / 3, again
    )
    torch.testing.assert_close(found, wanted)
    small = values.float().requires_grad_()
    (found,) = torch.autograd.grad(loss(small, 1.3, torch.float32)[0], small)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_held_weight_and_what_it_makes_of_an_offset():
    weight, offset = torch.randn(2, 6, 5, dtype=F64, requires_grad=True), torch.randn(2, 5, dtype=F64)
    x = torch.randn(7, 5, dtype=F64)

    def outputs(w):
        held, made = OffsetOutput.apply(w, offset)
        return (held @ x.t()).sin().sum() + made.square().sum()

    assert gradcheck(outputs, (weight,))
    _, made = OffsetOutput.apply(weight, offset)
    torch.testing.assert_close(made, torch.einsum("goi,gi->go", weight, offset).flatten())


def test_quantize_rounds_saturates_and_passes_gradients():
    y = torch.tensor([-9.0, 0.26, 0.24, 9.0], requires_grad=True)
    q = Quantize.apply(y, torch.tensor(0.5), 3)
    assert q.tolist() == [-1.5, 0.5, 0.0, 1.5]
    q.sum().backward()
    assert y.grad.tolist() == [0, 1, 1, 0]  # none where it saturates


@pytest.mark.parametrize("shape", [(70,), (5, 70), (3, 50, 70), (3, 70, 5, 4), (70, 5, 4), (0, 70), (1100, 10, 70)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("one_step", [True, False])
def test_quantize_in_pieces_and_with_a_bias(shape, layout, one_step):
    channel = len(shape) - 3 if 70 in shape[-3:-2] else len(shape) - 1
    y = torch.randn(shape)
    if len(shape) == 4:
        y = y.to(memory_format=layout)
    vector = (70, 1, 1) if channel == len(shape) - 3 else (70,)
    step = torch.rand((1,) * len(vector) if one_step else vector) + 0.1
    bias = torch.randn(vector, requires_grad=True)
    y.requires_grad_()
    found = Quantize.apply(y, step, 7, bias)
    torch.testing.assert_close(found, (y / step).round().clamp(-7, 7) * step + bias)
    weights = torch.randn(shape)
    gradients = torch.autograd.grad((found * weights).sum(), (y, bias))
    torch.testing.assert_close(gradients[0], torch.where((y.detach() / step).abs() < 7.5, weights, 0.0))
    torch.testing.assert_close(gradients[1], weights.sum_to_size(bias.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(70,), (5, 70), (1100, 10, 70)])
def test_quantize_in_place(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(70, requires_grad=True)
    weights, step = torch.randn(shape), torch.rand(70) + 0.1
    results = []
    for in_place in (False, True):
        y = x * 3
        found = Quantize.apply(y, step, 7, bias, in_place)
        assert (found is y) is in_place
        results.append((found.detach(), *torch.autograd.grad((found * weights).sum(), (x, bias))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_frozen_weights_drift_alike():
    weight, scale, noise = torch.randn(6, 5), torch.rand(6, 1) + 1, torch.randn(6, 5)
    error = weight_error(DeviceConfig.from_preset("hfox-neurram"), (86400.0,), None)
    tables = error.std.table(weight), error.means[0].table(weight)
    learned, _ = DriftedWeight.apply(weight.clone().requires_grad_(), scale, noise.clone(), *tables)
    frozen, _ = DriftedWeight.apply(weight, scale, noise, *tables)
    assert torch.equal(learned, frozen) and not frozen.requires_grad


def test_a_mean_shift_has_a_gradient_at_the_edge_of_the_range():
    torch.manual_seed(0)
    scale = torch.rand(50, 1) + 0.5
    weight = (scale * torch.linspace(-1, 1, 8)).requires_grad_()
    reference.weight_mean(weight, scale, curve(0.0, 0.3, 0.1).table(weight)).sum().backward()
    a = (weight.detach() / scale).abs()
    torch.testing.assert_close(weight.grad, 0.3 + 0.2 * a, rtol=2e-3, atol=0.0)
