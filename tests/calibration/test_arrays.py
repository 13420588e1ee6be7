"""Layers that share cells or inputs, tiles of convolutions, and batches that are none."""

import copy
import re

import pytest
import torch
from torch import nn

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    patch_model,
    sampled_drift,
    summarize,
)
from tests.samples.devices import device


class Tied(nn.Module):
    """Two layers of one weight, which read different inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(3 * self.a(x).relu())


@pytest.mark.parametrize("options", [{}, {"redundancy": 1.0}, {"equalize_inputs": True}, {"weight_clip": 2.0}], ids=str)
def test_tied_layers_are_one_array(options):
    torch.manual_seed(0)
    model = Tied()
    patch_model(model, ReRAMConfig(center_inputs=False, **options))
    calibrate(model, [torch.randn(300, 32) * torch.rand(32)])
    assert torch.equal(model.a.row_copies, model.b.row_copies)
    assert (float(model.a.row_copies.sum()) == 64) is ("redundancy" in options)
    assert sum(layer.cells for layer in {model.a.weight: model.a}.values()) == summarize(model).cells
    with deploy(model, "1d", seed=1):
        assert torch.equal(model.a.chip.weight, model.b.chip.weight)
    # Also in training: the same cells have the same error.
    model.train()
    errors = []
    for layer in (model.a, model.b):
        eye = torch.eye(32) * 1e-3 * float(layer.input_range)
        with torch.no_grad():
            clean = layer(eye)
            with sampled_drift(model, seed=5):
                errors.append((layer(eye) - clean) / (1e-3 * layer.input_range))
    torch.testing.assert_close(errors[0] / errors[0].norm(), errors[1] / errors[1].norm(), rtol=0, atol=1e-4)


class Reused(nn.Module):
    """``l`` reads two inputs; of the second it is the first reader, and ``m`` the next."""

    def __init__(self):
        super().__init__()
        self.k, self.l, self.m = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.k(x) + self.l(x)) + 5
        return self.l(h) + self.m(h)


def test_a_reader_after_one_that_is_reused_is_centered():
    torch.manual_seed(0)
    model, x = Reused(), torch.randn(200, 16)
    with torch.no_grad():
        h = torch.tanh(model.k(x) + model.l(x)) + 5
        weights = 1 / h.norm(dim=1, keepdim=True)
        exact = (h * weights).sum(0) / weights.sum()
    patch_model(model, ReRAMConfig())
    calibrate(model, [x[:50], x[50:]])
    torch.testing.assert_close(model.m.input_offset, exact)


@pytest.mark.parametrize("sharing", ["per_channel", "per_tile"])
@pytest.mark.parametrize(("tile", "rows", "tiles"), [(4, 4, 25), (24, 24, 5), (60, 50, 2), (200, 100, 1)])
def test_no_tile_of_a_convolution_has_more_rows_than_tile_size(tile, rows, tiles, sharing):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 5, padding=2)).eval()
    x = torch.randn(4, 4, 9, 9)
    model = copy.deepcopy(plain)
    options = {"dac_bits": 14, "adc_bits": 14, "tile_size": tile, "weight_scale": sharing, "weight_clip": None}
    cell = device(v0=1e6, floor_at_zero=False)
    patch_model(model, ReRAMConfig(device=cell, range_shrink=1.0, retention_loss="weight", **options))
    calibrate(model, [x])
    assert (model[0].tile_rows(), model[0].tiles()) == (rows, tiles)
    with torch.no_grad():
        exact = plain(x)
        assert float((model(x) - exact).norm() / exact.norm()) < 2e-3
    gradients = []
    for one in (plain, model):
        (gradient,) = torch.autograd.grad(one.train()(x).square().sum(), one[0].weight)
        gradients.append(gradient)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 5e-3
    # Each weight errs by the scale of its own tile.
    model(x)
    term = float(add_retention_loss(model(x).sum() * 0.0, model, 1.0)[0].detach())
    weight = model[0].weight.detach().flatten(1)
    scale = [part.abs().amax(1, keepdim=True).expand(part.shape) for part in weight.split(rows, 1)]
    scale = torch.cat(scale, 1) if sharing == "per_tile" else weight.abs().amax(1, keepdim=True).expand(weight.shape)
    std = [cell.retention_std(g, "1d") for g in cell.conductance(weight / scale)]
    noise = ((std[0] ** 2 + std[1] ** 2) * scale**2 / cell.g_range**2).sum()
    assert term == pytest.approx(float(noise / weight.square().sum()), rel=1e-3)


@pytest.mark.parametrize("clip", [None, "auto"])
def test_noise_has_the_power_of_drift_where_channels_differ(clip):
    """Few heavy-tailed channels with large scales and small weights, many without tails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.uniform_(-0.1, 0.1)
        model[0].weight[:8] = 0.1 * torch.distributions.StudentT(2.0).sample((8, 64))
    patch_model(model, ReRAMConfig(weight_clip=clip, range_shrink=1.0, retention_loss="noise"))
    calibrate(model, [torch.randn(100, 64)]).train()
    eye, power = torch.eye(64) * 0.5, {}
    with torch.no_grad():
        clean = model(eye)
        for kind in ("drift", "noise"):
            drawn = []
            for seed in range(150):
                with sampled_drift(model, kind, seed):
                    drawn.append((model(eye) - clean).square().mean())
            power[kind] = float(torch.stack(drawn).mean())
    assert power["noise"] == pytest.approx(power["drift"], rel=0.05)


@pytest.mark.parametrize("key", ["pixel_values", "labels"])
def test_a_batch_that_the_model_does_not_take_is_named(key):
    batch = {key: torch.zeros(2, 8)}
    model = nn.Sequential(nn.Linear(8, 3))
    patch_model(model, ReRAMConfig())
    with pytest.raises(TypeError, match=re.escape(f"of {[key]}: allowed is what its forward takes")):
        calibrate(model, [batch])
    assert not any(layer.calibrated for layer in crossbar_layers(model).values())


def test_computed_weights_are_arrays_of_their_own():
    """A parametrization makes a new tensor each time, and the next layer's may stand where the last one's did."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.mul_(i + 1)
    patch_model(model, ReRAMConfig())
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    calibrate(model, [torch.randn(200, 16)])
    largest = [float(layer.weight.detach().abs().max()) for layer in model]
    assert all(0.3 * top < float(layer.weight_scale.max()) <= 1.001 * top for layer, top in zip(model, largest))
    assert summarize(model).cells == 2 * 4 * 16 * 16
