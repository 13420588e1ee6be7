import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reram import (
    ReRAMConfig,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    patch_model,
    retention_loss,
    unpatch_model,
)
from hf_reram.nn.array import cell_weight
from hf_reram.nn.drive import drive
from tests.samples.devices import device, straight
from tests.samples.layers import KINDS, layer_of
from tests.samples.models import bert_batch


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_b_to_zero_is_the_digital_layer_and_unpatching_gives_it_back(kind, training):
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).train(training)
    keys, expected = list(model.state_dict()), model(x)
    pointer = layer.weight.data_ptr()
    patch_model(model, straight(retention_loss="output"))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    with digital(model):
        assert torch.equal(model(x), expected)
    assert layer.weight.data_ptr() == pointer
    assert set(keys) <= set(model.state_dict())
    unpatch_model(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_centering_the_input_changes_nothing_on_ideal_cells(kind, training):
    layer, x = layer_of(kind)
    x = x.abs() + 0.5  # one-sided
    model = nn.Sequential(layer).train(training)
    expected = model(x)
    (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    patch_model(model, straight(retention_loss="output", input_percentile=100))
    calibrate(model, [x])
    assert layer.centered and float(layer.input_range) < float(x.max())
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["scaled", "loaded", "moved"])
def test_an_input_offset_that_changes_is_noticed(change):
    layer, x = layer_of("linear")
    x = x.abs() + 0.5
    model = nn.Sequential(layer).train()
    expected = model(x).detach()
    patch_model(model, straight(retention_loss="none", input_percentile=100))
    calibrate(model, [x])
    model(x).sum().backward()  # W o has been computed
    with torch.no_grad():
        if change == "scaled":
            layer.input_offset.mul_(0.9)
        elif change == "loaded":
            state = model.state_dict()
            model.load_state_dict({**state, "0.input_offset": state["0.input_offset"] * 0.9})
        else:
            model.double()
            layer.input_offset.mul_(0.9)
            x, expected = x.double(), expected.double()
        layer.input_range.mul_(1.5)
    layer.weight.grad = None
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.weight.grad, x.flatten(0, -2).sum(0).expand(layer.weight.shape), rtol=1e-5, atol=1e-5
    )


def test_term_counts_what_varies_of_a_centered_input():
    """On a constant input nothing is left for the cells' errors to act on."""
    layer, x = nn.Linear(8, 6), torch.rand(200, 8) + 3
    model = nn.Sequential(layer).train()
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [x])
    model(x)
    varying = float(retention_loss(model).detach())
    with torch.no_grad():
        noise = {}
        for offset in (layer.input_offset.clone(), torch.zeros(8)):
            layer.input_offset.copy_(offset)
            layer.input_range.fill_(float((x - offset).abs().max()))
            model(x)
            (term,) = layer.crossbar.forward.terms.values()
            noise[bool(offset.any())] = float(term[0])
    assert noise[True] < noise[False] / 30
    assert 0 < varying < 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_term_is_that_of_the_linear_form(kind):
    """R of any layer equals that of the matrix that its unfolded inputs meet."""
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).train()
    patch_model(
        model,
        ReRAMConfig(device=device(floor_at_zero=False), range_shrink=1.0, weight_clip=2.0, retention_loss="output"),
    )
    calibrate(model, [x])
    model(x)
    found = retention_loss(model)
    (layer,) = crossbar_layers(model).values()
    with torch.no_grad():
        driven = drive(layer, x, layer.scalars())
        phi = driven.s
        if isinstance(kind, dict):
            padded = phi if driven.padded else layer.pad(phi)
            shape = layer.kernel_size, layer.dilation, 0, layer.stride
            if padded.dim() == 3:  # a picture of height 1
                padded, shape = padded[:, :, None], [(1, *v) if v else 0 for v in shape]
            columns = F.unfold(padded, *shape).transpose(1, 2)
            columns = columns.reshape(-1, layer.groups, columns.shape[-1] // layer.groups)  # (n · pixels, groups, rows)
        else:
            columns = phi.reshape(-1, 1, 8)
        rows = layer.to_rows(cell_weight(layer, layer.weight))
        scale = layer.weight_scale.view(*rows.shape[:2], 1)
        held = torch.maximum(torch.minimum(rows, scale), -scale)
        cell = layer.crossbar.config.device
        plus, minus = cell.conductance(held / scale)
        variance = (cell.retention_std(plus, "1d") ** 2 + cell.retention_std(minus, "1d") ** 2) / cell.g_range**2
        noise = torch.einsum("gor,ngr->", variance * scale**2, columns.square())
        signal = torch.einsum("gor,ngr->ngo", held, columns).square().sum()
    torch.testing.assert_close(found, noise / signal, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS[:8], ids=str)
def test_tiles_with_fine_converters_add_up_to_the_whole(kind):
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).eval()
    expected = model(x)
    patch_model(model, straight(dac_bits=16, adc_bits=16, tile_size=3))
    calibrate(model, [x])
    # Not every output: the ADC's range comes from samples, and a rare larger current saturates.
    close = (model(x) - expected).abs() < 2e-3
    assert float(close.float().mean()) > 0.99


def test_coarse_adc_rounds_each_tile():
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).eval()
    patch_model(model, straight(adc_bits=3))
    x = torch.randn(50, 8)
    calibrate(model, [x])
    y = model(x)
    assert all(len(y[:, i].unique()) <= 7 for i in range(6))


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_all_gradients_against_finite_differences(shift):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double().train()
    x = torch.randn(9, 6, dtype=torch.float64) + shift
    patch_model(model, ReRAMConfig(range_shrink=0.7, weight_clip=None, retention_loss="output"))
    calibrate(model, [(x - shift) * 2 + shift])
    assert shift == 0 or model[0].centered
    for layer in crossbar_layers(model).values():
        layer.weight_scale.mul_(1.5)  # off the kink at the largest weight

    def loss():
        return model(x).square().mean() + 3 * retention_loss(model)

    loss().backward()
    for p in model.parameters():
        for index in torch.randint(p.numel(), (4,)).tolist():
            values, eps = [], 1e-5
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[index] += sign * eps
                    values.append(float(loss()))
                    p.view(-1)[index] -= sign * eps
            assert float(p.grad.view(-1)[index]) == pytest.approx(
                (values[0] - values[1]) / (2 * eps), rel=2e-3, abs=2e-6
            )


def test_zero_rows_zero_layers_and_constant_inputs_stay_finite():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).train()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[1].weight.zero_()
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [torch.zeros(4, 8)])
    y = model(torch.zeros(4, 8))
    (y.sum() + retention_loss(model)).backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_query_key_and_value_share_one_phi(tiny_bert, monkeypatch):
    from hf_reram.nn import drive as driving

    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    calls = []
    forward = driving.ShrunkSinh.apply
    monkeypatch.setattr(driving.ShrunkSinh, "apply", lambda *a: calls.append(1) or forward(*a))
    tiny_bert.train()(**bert_batch())
    layers = len(crossbar_layers(tiny_bert))
    assert len(calls) == layers - 2 * tiny_bert.config.num_hidden_layers


def test_same_padding_of_timm():
    layers = pytest.importorskip("timm.layers")
    for size, kernel, stride in [(11, 3, 2), (12, 5, 2), (7, 3, 1)]:
        model = nn.Sequential(layers.Conv2dSame(4, 6, kernel, stride=stride))
        x = torch.randn(2, 4, size, size + 1)
        expected = model(x)
        model_of_crossbars = patch_model(model, straight())
        torch.testing.assert_close(model_of_crossbars(x), expected, rtol=1e-5, atol=1e-6)
        with digital(model):
            assert torch.equal(model(x), expected)


def test_a_square_conv1d_larger_than_a_piece_agrees_with_the_linear_form():
    conv, linear = Conv1D(768, 768), nn.Linear(768, 768)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    x, found = torch.randn(4, 768), []
    for layer in (conv, linear):
        model = nn.Sequential(layer).train()
        patch_model(model, ReRAMConfig(retention_loss="output", weight_clip=2.0))
        model(x)
        found.append(retention_loss(model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("tile", [None, 4])
def test_read_noise_is_converted_with_the_current(tile):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(40, 8)
    cell = device(read_noise=0.2)
    patch_model(model, ReRAMConfig(device=cell, adc_bits=5, tile_size=tile, center_inputs=False))
    calibrate(model, [x])
    layer = model[0]
    with deploy(model, "1s"), torch.no_grad():
        first, second, silent = model(x), model(x), model(torch.zeros_like(x))
    now = layer.scalars()
    unit = layer.weight_scale * now.input_range * now.gain * cell.b() / now.b
    steps = (first - layer.bias) / (layer.adc_range * unit / 15)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert not torch.equal(first, second)
    assert (silent == layer.bias).float().mean() > 0.5  # noise below half a step is not read
