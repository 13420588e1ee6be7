import pytest
import torch
from torch import nn

from hf_reram import DeviceConfig, ReRAMConfig, patch_model
from hf_reram.device.moments import weight_error
from hf_reram.nn import mapping
from hf_reram.nn.mapping import (
    CLIPS,
    Inputs,
    Magnitudes,
    expected_error,
    least_error_scales,
    relative_weights,
    weight_scales,
)

ERROR = weight_error(DeviceConfig.from_preset("hfox-neurram"), (86400.0,), None)


def setting():
    """Ordinary weights and inputs, but for one large weight that a single token drives hard."""
    rows = torch.randn(1, 32, 64)
    rows[:, :, 0] = 6.0
    inputs = torch.randn(1, 256, 64)
    inputs[:, :, 0] *= 0.05
    inputs[:, 7] = 0
    inputs[:, 7, 0] = 30.0
    return rows, inputs


def relative(rows, inputs):
    return Inputs(inputs * relative_weights(rows, inputs).sqrt()[:, None])


def test_one_massive_token_does_not_decide_for_all():
    rows, inputs = setting()
    absolute = weight_scales(rows, "auto", True, ERROR, Inputs(inputs))
    found = weight_scales(rows, "auto", True, ERROR, relative(rows, inputs))
    assert found.max() < 0.6 * absolute.min()
    # And the noise that the other tokens see is the smaller for it.
    ordinary = Inputs(torch.cat([inputs[:, :7], inputs[:, 8:]], 1))
    errors = [expected_error(rows, scale.view(1, 32, 1), ERROR, ordinary).sum() for scale in (found, absolute)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("groups", "channels"), [(1, 33), (5, 7), (12, 1)])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_channels_in_pieces_get_the_same_scales(monkeypatch, groups, channels, with_inputs):
    rows = torch.randn(groups, channels, 20) * torch.rand(groups, channels, 1)
    inputs = Inputs(torch.randn(groups, 30, 20)) if with_inputs else None
    whole = weight_scales(rows, "auto", True, ERROR, inputs, systematic=2.0)
    monkeypatch.setattr(mapping, "ELEMENTS", 4 * groups * 20)  # four channels a piece
    torch.testing.assert_close(weight_scales(rows, "auto", True, ERROR, inputs, systematic=2.0), whole)


@pytest.mark.parametrize("per_channel", [True, False])
def test_auto_is_the_best_of_its_candidates(per_channel):
    rows, inputs = setting()
    inputs = relative(rows, inputs)
    best = weight_scales(rows, "auto", per_channel, ERROR, inputs).view(1, -1, 1)
    total = expected_error(rows, best.expand(1, 32, 1), ERROR, inputs)
    for clip in (None, 1.5, 2.0, 3.0, 5.0):
        other = weight_scales(rows, clip, per_channel, ERROR, inputs).view(1, -1, 1)
        cost = expected_error(rows, other.expand(1, 32, 1), ERROR, inputs)
        assert (total <= cost * 1.0001).all() if per_channel else total.sum() <= cost.sum() * 1.0001


HEAVY = torch.distributions.StudentT(3.0)


@pytest.mark.parametrize("preset", ["hfox-neurram", "cmo-hfox-ibm", "generic"])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_sums_over_bins_of_magnitude_are_those_over_weights(preset, with_inputs):
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(2, 8, 700), HEAVY.sample((2, 8, 700)), torch.zeros(2, 1, 700)], 1)
    error = weight_error(DeviceConfig.from_preset(preset), (86400.0,), None)
    x = torch.randn(2, 50, 700) * torch.rand(2, 1, 700)
    inputs = Inputs(x, torch.randn(2, 1, 700).expand(x.shape), 1e-3) if with_inputs else None
    rms = rows.square().mean(2, keepdim=True).sqrt()
    sizes = Magnitudes.of(rows, rms, x.square().mean(1)[:, None] if with_inputs else None)
    for multiple in (1.0, 2.5, 8.0):
        scale = torch.minimum(rows.abs().amax(2, keepdim=True), multiple * rms)
        exact = expected_error(rows, scale, error, inputs, 2.0)
        torch.testing.assert_close(expected_error(rows, scale, error, inputs, 2.0, sizes), exact, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("levels", [None, 16])
def test_auto_of_wide_layers_is_near_the_best_of_all_candidates(levels):
    torch.manual_seed(0)
    rows = HEAVY.sample((1, 64, 600))
    inputs = relative(rows, torch.randn(1, 128, 600) * torch.randn(1, 1, 600).exp())
    device = DeviceConfig.from_dict({**DeviceConfig.from_preset("hfox-neurram").to_dict(), "levels": levels})
    error = weight_error(device, (86400.0,), None)
    largest, rms = rows.abs().amax(2, keepdim=True), rows.square().mean(2, keepdim=True).sqrt()
    scales = [torch.minimum(largest, clip * rms) for clip in (*CLIPS, 1e9)]
    costs = torch.stack([expected_error(rows, scale, error, inputs) for scale in scales])
    found = weight_scales(rows, "auto", True, error, inputs).view(1, -1, 1)
    assert all((found == scale).any() for scale in scales[2:6])  # not one for all
    assert expected_error(rows, found, error, inputs).sum() <= 1.01 * costs.amin(0).sum()


def test_expected_error_is_what_sampling_shows():
    rows, inputs = setting()
    scale = weight_scales(rows, 2.0, True, ERROR, None).view(1, 32, 1)
    found = expected_error(rows, scale, ERROR, Inputs(inputs))[0, :, 0]
    device, draws = DeviceConfig.from_preset("hfox-neurram"), []
    held = torch.maximum(torch.minimum(rows, scale), -scale)
    plus, minus = device.conductance(held / scale)
    std = [device.retention_std(g, "1d") for g in (plus, minus)]
    for _ in range(300):
        found_at = [(g + s * torch.randn_like(g)).clamp(min=0) for g, s in zip((plus, minus), std)]
        aged = scale * (found_at[0] - found_at[1]) / device.g_range
        draws.append(torch.bmm(aged - rows, inputs.transpose(1, 2)).square().mean(2)[0])
    torch.testing.assert_close(found, torch.stack(draws).mean(0), rtol=0.15, atol=0.0)


def test_zero_channels_get_scale_zero():
    rows, inputs = setting()
    rows[0, 3] = 0
    scales = weight_scales(rows, "auto", True, ERROR, Inputs(inputs))
    assert scales[3] == 0
    assert torch.isfinite(scales).all()
    assert least_error_scales(rows * 0, *[torch.zeros(1, 1, 1)] * 2, ERROR, None).item() == 0


def test_a_convolution_clips_less_than_a_linear_layer_of_the_same_weights():
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((8, 16))
    linear, conv = nn.Linear(16, 8), nn.Conv2d(16, 8, 1)
    scales = []
    for layer in (linear, conv):
        layer.weight.data.copy_(weight.view(layer.weight.shape))
        patch_model(nn.Sequential(layer), ReRAMConfig(device="hfox-neurram"))
        scales.append(layer.weight_scale)
    assert (scales[1] >= scales[0]).all() and (scales[1] > scales[0]).any()
