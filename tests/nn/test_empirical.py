"""Layers on a device of measured tables: what chips, sampled drift and closed forms say of the same weights."""

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, add_retention_loss, calibrate, crossbar_layers, deploy, patch_model, sampled_drift
from hf_reram.device import parse_time
from hf_reram.device.moments import weight_error
from hf_reram.nn.ops.reference import looked_up

pytestmark = pytest.mark.filterwarnings("ignore:retention was measured")


def layer(**options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    patch_model(model, ReRAMConfig(device="rram-levy-c", retention_times=["1d"], **options))
    calibrate(model, [torch.randn(64, 256)])
    return model


def moments(model: nn.Module, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the error of each weight that the closed form has."""
    found = next(iter(crossbar_layers(model).values()))
    scale = found.held_scale(torch.float32)
    share = (weight.abs() / scale).clamp(max=1)
    error = weight_error(found.crossbar.config.device, (parse_time("1d"),), None)
    std = looked_up(error.std.table(share), share)[0]
    mean = looked_up(error.means[0].table(share), share)[0]
    return mean * scale * weight.sign(), (std * scale) ** 2


def agree(errors: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Sums over the weights, of which each was drawn anew, within 3 standard errors."""
    off = errors - mean
    count = off.numel()
    assert abs(float(off.mean())) < 3 * float(off.std()) / count**0.5
    squares = off.square() - variance
    assert abs(float(squares.mean())) < 3 * float(squares.std()) / count**0.5


def test_chips_sampled_drift_and_closed_form_agree():
    model = layer(weight_clip=None)
    found = next(iter(crossbar_layers(model).values()))
    weight = found.weight.detach().clone()
    mean, variance = moments(model, weight)
    assert float(variance.mean()) > 0
    chips = []
    for seed in range(8):
        with deploy(model, time="1d", seed=seed):
            chips.append(found.chip.weight - weight)
    agree(torch.stack(chips), mean, variance)

    model.train()
    drawn = []
    for seed in range(8):
        with sampled_drift(model, seed=seed):
            drawn.append(model(torch.eye(256) * float(found.input_range)).T / float(found.input_range))
    ideal = model.eval()(torch.eye(256) * float(found.input_range)).T / float(found.input_range)
    gain = float((ideal / weight).median())
    agree(torch.stack(drawn).detach() / gain - weight, mean, variance)


def test_training_on_it_has_a_loss_and_gradients():
    model = layer(retention_loss="output").train()
    with sampled_drift(model):
        loss, term = add_retention_loss(model(torch.randn(8, 256)).square().mean(), model)
    loss.backward()
    assert float(term) > 0
    assert torch.isfinite(model[0].weight.grad).all() and float(model[0].weight.grad.abs().sum()) > 0
