"""What calibration chooses, against brute force over what chips show."""

import copy

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, calibrate, deploy, digital, follow_training, patch_model
from hf_reram.calibration.scales import MASSIVE
from hf_reram.nn.mapping import CLIPS, CONVOLUTION
from hf_reram.training.following import clamped_shares
from tests.samples.devices import device
from tests.samples.models import bert_batch


def inputs_of(kind: str) -> torch.Tensor:
    """Plain ones, some rare huge vectors among them, or a large mean."""
    x = torch.randn(300, 192)
    if kind == "rare":
        x[::97] *= 40
    return x + 3 if kind == "offset" else x


def layer_on(x: torch.Tensor, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(x.shape[1], 48, bias=False)).eval()
    patch_model(model, ReRAMConfig(retention_loss="none", **options))
    return calibrate(model, [x])


@torch.no_grad()
def relative_error(model: nn.Module, x: torch.Tensor) -> float:
    """Of three chips after a day, each vector's error relative to its exact output."""
    with digital(model):
        exact = model(x)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        with deploy(model, "1d", seed=seed):
            found.append(((model(x) - exact).square().sum(1) / exact.square().sum(1)).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("clip", ["auto", 1.5, None])
@pytest.mark.parametrize("kind", ["plain", "rare", "offset"])
@pytest.mark.parametrize("bits", [4, 6])
def test_no_other_full_scale_of_the_adc_is_much_better(bits, kind, clip):
    torch.manual_seed(0)
    x = inputs_of(kind)
    model = layer_on(x, device=device(), adc_bits=bits, weight_clip=clip)
    chosen, full_scale = relative_error(model, x), model[0].adc_range.clone()
    others = []
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 1.4, 2.0, 4.0):
        model[0].adc_range.copy_(share * full_scale)
        others.append(relative_error(model, x))
    assert chosen < 1.1 * min(others)


@pytest.mark.parametrize("tile", [None, 48])
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "rare", "offset"])
def test_no_other_clip_is_much_better(kind, noise, tile):
    """The offset's part of a clipped weight is lost with it; read noise grows with the weight scale."""
    torch.manual_seed(0)
    x = inputs_of(kind)
    model = layer_on(x, device=device(read_noise=noise), tile_size=tile)
    chosen = relative_error(model, x)
    weight, others = model[0].weight.detach(), []
    for clip in (*CLIPS, 100.0):
        scale = torch.minimum(weight.abs().amax(1), clip * weight.square().mean(1).sqrt())
        model[0].weight_scale.copy_(scale)
        others.append(relative_error(model, x))
    assert chosen < 1.1 * min(others)


@pytest.mark.parametrize(("input_range", "size"), [("per_token", 300.0), ("static", 300.0), ("per_token", 20.0)])
def test_what_only_massive_tokens_drive_is_not_clipped_for_the_others(input_range, size):
    """Where tokens have ranges of their own, massive ones count as much as all others; else as one of many."""
    torch.manual_seed(0)
    x = torch.randn(2000, 192)
    x[:, :4] = 0
    x[::250] = 0.1 * torch.randn(8, 192)
    x[::250, :4] = size
    model = nn.Sequential(nn.Linear(192, 48, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[:, :4] *= 6
    config = ReRAMConfig(device(), retention_loss="none", input_range=input_range, center_inputs=False)
    layer = calibrate(patch_model(model, config), [x])[0]

    def errors():
        rare = relative_error(model, x[::250])
        return rare, relative_error(model, x[1:250])

    chosen, weight, others = errors(), layer.weight.detach(), []
    for clip in (*CLIPS, 100.0):
        layer.weight_scale.copy_(torch.minimum(weight.abs().amax(1), clip * weight.square().mean(1).sqrt()))
        others.append(errors())
    if input_range == "per_token" and size > MASSIVE * 3:  # the largest of 188 normal variates
        assert sum(chosen) < 1.1 * min(map(sum, others))
        assert chosen[0] < 0.5 * min(others, key=lambda error: error[1])[0]  # what suits the others alone
    else:
        assert chosen[1] < 1.1 * min(error for _, error in others)


@torch.no_grad()
def counted_error(model: nn.Module, x: torch.Tensor, exact: torch.Tensor, chips: int = 12) -> float:
    """What chips show of a convolution: the error that they have in common, counted as often as it is, and the rest."""
    outputs = []
    for seed in range(chips):
        torch.manual_seed(seed)
        with deploy(model, "1d", seed=seed):
            outputs.append(model(x))
    outputs = torch.stack(outputs)
    random = float(outputs.var(0).sum())
    common = float((outputs.mean(0) - exact).square().sum()) - random / chips
    return (CONVOLUTION * common + random) / float(exact.square().sum())


@pytest.mark.parametrize("options", [{}, {"tile_size": 18, "weight_scale": "per_tensor"}], ids=str)
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_no_other_clip_of_a_convolution_is_much_better_as_its_errors_count(noise, options):
    """Read noise averages over pixels as spread does over cells."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, bias=False, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * torch.exp(0.6 * torch.randn_like(layer.weight)))
        exact = layer(x := torch.randn(4, 8, 8, 8) + 1)
    found = {}
    for clip in ("auto", 1.0, 2.0, 3.0, 4.0, 6.0, None):
        model = nn.Sequential(copy.deepcopy(layer)).eval()
        config = ReRAMConfig(device=device(read_noise=noise), retention_loss="none", weight_clip=clip, **options)
        calibrate(patch_model(model, config), [x])
        found[clip] = counted_error(model, x, exact)
    assert found["auto"] < 1.1 * min(found.values())


@pytest.mark.parametrize("options", [{}, {"adc_bits": 8, "dac_bits": 8}], ids=str)
@pytest.mark.parametrize("tokens", ["massive", "spread"])
def test_auto_gives_tokens_of_different_sizes_a_range_each(tokens, options):
    """By what the chosen one leaves of each token's error, the rare massive ones' too."""
    torch.manual_seed(0)
    x = torch.randn(1500, 48)
    if tokens == "massive":
        x[::700] *= 300
    else:
        x *= torch.logspace(-1, 1, len(x))[:, None]
    plain = nn.Sequential(nn.Linear(48, 32))
    wanted = nn.functional.linear(x, plain[0].weight)
    errors = {}
    for kind in ("static", "per_token", "auto"):
        model = patch_model(copy.deepcopy(plain), ReRAMConfig(device="cmo-hfox-ibm", input_range=kind, **options))
        calibrate(model, [x])
        with torch.no_grad():
            error = (model.eval()(x) - model[0].bias - wanted).norm(dim=1) / wanted.norm(dim=1)
        errors[kind] = float(error.square().mean()), float(error.max())
    assert model[0].per_token.item() == 1.0
    assert errors["auto"] == errors["per_token"]
    assert errors["per_token"][0] < errors["static"][0] / 10 and errors["per_token"][1] < errors["static"][1]


def test_layers_that_read_the_same_input_have_the_same_kind_of_range(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(input_range="auto"))
    calibrate(tiny_bert.eval(), [bert_batch()])
    block = tiny_bert.bert.encoder.layer[0].attention.self
    kinds = {float(layer.per_token) for layer in (block.query, block.key, block.value)}
    ranges = {float(layer.input_range) for layer in (block.query, block.key, block.value)}
    assert len(kinds) == len(ranges) == 1


def test_a_tokens_own_range_follows_a_training():
    """Its offset and gain do, and nothing is beyond it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).train()
    patch_model(model, ReRAMConfig(input_range="per_token"))
    calibrate(model, [torch.randn(300, 12) + 4])
    follow_training(model)
    before = model[0].input_offset.clone()
    for _ in range(30):
        model(torch.randn(64, 12) * 50 + 400).square().mean().backward()
        follow_training(model)
    assert float(model[0].input_range) == 1.0
    assert float(before.mean()) < 5 and float(model[0].input_offset.mean()) == pytest.approx(400, rel=0.02)
    assert [float(share) for share in clamped_shares(model).values()] == [0.0]
