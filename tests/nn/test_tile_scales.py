"""weight_scale="per_tile": each output channel's cells within one tile have a conductance scale of their own."""

import copy

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, calibrate, deploy, hold_weights, patch_model, retention_loss, sampled_drift
from tests.samples.devices import device, straight
from tests.samples.layers import CONVS, KINDS, layer_of
from tests.samples.models import bert_batch

# The tiles of eight rows, three at most in each.
ROWS = {"linear": [3, 3, 2], "conv1d": [3, 3, 2]}


def patched(kind, tile_size=3, **fields):
    torch.manual_seed(1)
    layer, x = layer_of(kind)
    model = nn.Sequential(layer)
    patch_model(model, ReRAMConfig(weight_scale="per_tile", tile_size=tile_size, weight_clip=None, **fields))
    calibrate(model, [x])
    return model, layer, x


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_scale_is_the_largest_weight_of_each_tile(kind):
    _, layer, _ = patched(kind)
    rows = layer.to_rows(layer.weight.detach()).flatten(0, 1)
    parts = rows.split(layer.tile_rows(), 1)
    expected = torch.stack([part.abs().amax(1) for part in parts], 1)
    assert torch.equal(layer.weight_scale, expected)
    assert layer.weight_scale.shape == (len(rows), layer.tiles())
    if isinstance(kind, str):
        assert [part.shape[1] for part in parts] == ROWS[kind]
    elif layer.kernel_size != (1, 1):
        assert layer.tile_rows() == 3  # within an input channel, where it has more elements
    along = torch.cat([s[:, None].expand(p.shape) for s, p in zip(expected.unbind(1), parts)], 1)
    assert torch.equal(layer.to_rows(layer.held_scale().expand(layer.weight.shape)).flatten(0, 1), along)
    assert torch.equal(layer.along_rows(layer.weight_scale).flatten(0, 1), along)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("converters", [{}, {"dac_bits": 16, "adc_bits": 16}], ids=["ideal", "16 bits"])
def test_ideal_cells_are_the_digital_layer(kind, converters):
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).eval()
    expected = model(x)
    patch_model(model, straight(weight_scale="per_tile", tile_size=3, input_percentile=100, **converters))
    calibrate(model, [x])
    # Not every output with an ADC: its range comes from samples, and a rare larger current saturates.
    close = (model(x) - expected).abs() < (2e-3 if converters else 1e-5)
    assert float(close.float().mean()) > (0.99 if converters else 0.9999)


@pytest.mark.parametrize("kind", ["linear", "conv1d", CONVS[1], CONVS[4]], ids=str)
def test_chips_err_by_the_scale_of_their_tile(kind):
    cell = device(read_noise=0.0, floor_at_zero=False)
    model, layer, _ = patched(kind, device=cell)
    chips = []
    for seed in range(400):
        with deploy(model, "1d", seed=seed):
            chips.append(layer.chip.weight)
    errors = (torch.stack(chips) - layer.weight.detach()).square().mean(0)
    scale = layer.held_scale().expand(layer.weight.shape)
    plus, minus = cell.conductance(layer.weight.detach() / scale)
    expected = (cell.retention_std(plus, "1d") ** 2 + cell.retention_std(minus, "1d") ** 2) * (
        scale / cell.g_range
    ) ** 2
    assert float((errors / expected).mean()) == pytest.approx(1, abs=0.03)
    assert float((errors / expected).std()) < 3 * (2 / 400) ** 0.5 / 2


def test_smaller_parts_err_less():
    torch.manual_seed(0)
    layer = nn.Linear(512, 64)
    x = torch.randn(100, 512)
    powers = []
    for options in ({}, {"weight_scale": "per_tile", "tile_size": 64}):
        model = nn.Sequential(copy.deepcopy(layer))
        nn.init.normal_(model[0].weight)
        patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", weight_clip=None, **options))
        calibrate(model, [x])
        with deploy(model, "10y", seed=0):
            powers.append(float((model[0].chip.weight - model[0].weight).detach().square().mean()))
    # Of 64 normal weights the largest is 2.6 RMS at the mean, of 512 it is 3.3.
    assert powers[1] / powers[0] == pytest.approx((2.6 / 3.3) ** 2, abs=0.08)


@pytest.mark.parametrize("kind", ["linear", "conv1d", CONVS[1], CONVS[4]], ids=str)
def test_the_closed_form_is_the_power_of_sampled_errors(kind):
    cell = device(read_noise=0.0)
    options = {"range_shrink": 0.01, "input_percentile": 100, "center_inputs": False, "retention_loss": "output"}
    model, layer, x = patched(kind, device=cell, **options)
    model.train()
    model(x)
    found = float(retention_loss(model))
    with torch.no_grad():
        clean = model(x)
        bias = layer.over_channels(layer.bias)
        powers = []
        for _ in range(300):
            with sampled_drift(model, "drift"):
                powers.append((model(x) - clean).square().sum())
    assert found == pytest.approx(float(torch.stack(powers).mean() / (clean - bias).square().sum()), rel=0.1)


@pytest.mark.parametrize("clip", ["auto", 1.5])
def test_training_keeps_weights_within_their_tiles(clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 4))
    patch_model(model, ReRAMConfig(weight_scale="per_tile", tile_size=8, weight_clip=clip))
    x = torch.randn(64, 32)
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(3):
        with sampled_drift(model):
            model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        hold_weights(model)
    for layer in (model[0], model[2]):
        assert (layer.weight.abs() <= layer.held_scale()).all()
        assert (layer.weight.abs() == layer.held_scale()).any()


def test_it_is_saved_and_loaded(tiny_bert, tmp_path):
    batch = bert_batch()
    patch_model(tiny_bert.eval(), ReRAMConfig(weight_scale="per_tile", tile_size=8))
    calibrate(tiny_bert, [batch])
    tiny_bert.save_pretrained(tmp_path)
    again = type(tiny_bert).from_pretrained(tmp_path)
    assert again.bert.encoder.layer[0].intermediate.dense.weight_scale.shape == (32, 2)
    with torch.no_grad(), deploy(tiny_bert, "1d", seed=1), deploy(again, "1d", seed=1):
        torch.manual_seed(0)
        expected = tiny_bert(**batch).logits
        torch.manual_seed(0)
        assert torch.equal(again(**batch).logits, expected)


def test_a_tile_size_is_needed():
    with pytest.raises(ValueError, match=r"weight_scale='per_tile'.*tile_size"):
        ReRAMConfig(weight_scale="per_tile")
