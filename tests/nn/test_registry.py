"""Kinds of layers that the package does not have."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    inspect_layers,
    patch_model,
    register_crossbar,
    unpatch_model,
)
from hf_reram.nn import CrossbarLayer, registry
from tests.samples.devices import SILENT, device, straight


class CrossbarConvTime(CrossbarLayer, nn.Conv1d):
    """A convolution over time, as an example of what a user writes."""

    output_dim, input_dim, channel_dim = 0, 1, -2

    def multiply(self, x, weight, bias, padded=False):
        return F.conv1d(x if padded else self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x):
        return F.pad(x, (self.padding[0], self.padding[0]))

    def windows(self, x):
        span = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        found = x.unfold(-1, span, self.stride[0])[..., :: self.dilation[0]]  # (n, channels, positions, kernel)
        return found.transpose(1, 2).flatten(2).flatten(0, 1)

    def geometry(self):
        return self.kernel_size, self.stride, self.dilation, self.padding


class CrossbarBilinearLike(CrossbarLayer, nn.Linear):
    output_dim, input_dim, channel_dim = 0, 1, -1


@pytest.fixture(autouse=True)
def _forget_kinds(monkeypatch):
    kinds = {cls: kind for cls, kind in registry._CLASSES.items() if cls is not nn.Conv1d}
    monkeypatch.setattr(registry, "_CLASSES", kinds)
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))


def model_of(groups: int) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv1d(8, 12, 5, padding=2, stride=2, groups=groups)
    return nn.Sequential(first, nn.GELU(), nn.Conv1d(12, 6, 3, dilation=2, padding=1))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_kind_of_a_users_own(groups):
    model, x = model_of(groups), torch.randn(4, 8, 30)
    with pytest.raises(ValueError, match="nothing to patch"):
        patch_model(model, straight())
    register_crossbar(nn.Conv1d)(CrossbarConvTime)
    expected = model(x)
    patch_model(model, straight())
    assert list(crossbar_layers(model)) == ["0", "2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    calibrate(model, [x])
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    with digital(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(unpatch_model(model)(x), expected)


@pytest.mark.parametrize("options", [{}, {"tile_size": 6, "adc_bits": 16, "dac_bits": 16}, {"equalize_inputs": True}])
def test_it_is_calibrated_converted_and_deployed_as_others_are(options):
    register_crossbar(nn.Conv1d)(CrossbarConvTime)
    model, x = model_of(1).eval(), torch.rand(16, 8, 30) + 0.5  # one-sided, so that it is centered
    expected = model(x)
    patch_model(model, ReRAMConfig(device=device(v0=1e6, retention=SILENT), weight_clip=None, **options))
    calibrate(model, [x])
    assert model[0].centered
    with torch.no_grad(), deploy(model, "1d"):
        error = (model(x) - expected).square().mean() / expected.square().mean()
    assert float(error) < 1e-3


def test_its_closed_form_is_what_chips_show():
    register_crossbar(nn.Conv1d)(CrossbarConvTime)
    model, x = model_of(4)[:1], torch.randn(8, 8, 30)
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0, v0=1e6), retention_loss="output", center_inputs=False))
    calibrate(model, [x])
    model.train()
    _, expected = add_retention_loss(model(x).sum(), model)
    model.eval()
    with torch.no_grad():
        clean = model(x)
        signal = (clean - model[0].bias[:, None]).square().sum()
        found = []
        for seed in range(80):
            with deploy(model, "1d", seed=seed):
                found.append(float((model(x) - clean).square().sum() / signal))
    assert sum(found) / len(found) == pytest.approx(float(expected), rel=0.1)
    (report,) = inspect_layers(model, "1d", batches=[x])
    assert report.kind == "Conv1d" and (report.rows, report.columns) == (10, 12)
    assert report.noise_to_signal == pytest.approx(float(expected), rel=1e-4)


def test_what_does_not_keep_the_contract_is_refused():
    with pytest.raises(TypeError, match="lacks multiply"):
        register_crossbar(nn.Linear)(CrossbarBilinearLike)
    with pytest.raises(TypeError, match="allowed is a subclass of CrossbarLayer and Conv1d"):
        register_crossbar(nn.Conv1d)(CrossbarBilinearLike)
    with pytest.raises(TypeError, match="allowed is a class of layers"):
        register_crossbar(7)
    with pytest.raises(TypeError, match="lacks output_dim, input_dim, channel_dim, multiply"):
        register_crossbar(nn.Bilinear)(type("Bare", (CrossbarLayer, nn.Bilinear), {}))


class Plain(nn.Linear):
    factor = 3

    @property
    def norm(self):
        return self.factor * self.weight.norm()


def test_by_name_and_for_subclasses():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(4, 4), Plain(4, 4))
    patch_model(model, straight())
    assert list(crossbar_layers(model)) == ["1"]  # the other computes something else
    norm, y = 3 * model[1].weight.norm(), model(torch.ones(2, 4))
    for same in (model, copy.deepcopy(model), copy.deepcopy(model[1:]), pickle.loads(pickle.dumps(model[1:]))):
        assert isinstance(same[-1], Plain) and same[-1].norm == norm
        x = model[0](torch.ones(2, 4))
        assert torch.equal(same[-1](x), y)
        with deploy(same, "10y"):
            assert not torch.equal(same[-1](x), y)
    unpatch_model(model)
    assert type(model[1]) is Plain

    @register_crossbar(f"{Scaled.__module__.partition('.')[0]}.Scaled")
    class CrossbarScaled(CrossbarLayer, nn.Linear):
        output_dim, input_dim, channel_dim = 0, 1, -1

        def multiply(self, x, weight, bias, padded=False):
            return 2 * F.linear(x, weight, bias)

    x = torch.randn(3, 4)
    expected = model(x)
    patch_model(model, straight())
    assert list(crossbar_layers(model)) == ["0", "1"] and type(model[0]) is CrossbarScaled
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(unpatch_model(model)(x), expected)


def test_the_example_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code, "docs/design.md", "exec"), {})
    model, x = model_of(4).eval(), torch.randn(4, 8, 30)
    expected = model(x)
    patch_model(model, straight())
    calibrate(model, [x])
    assert list(crossbar_layers(model)) == ["0", "2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


class Standardized(nn.Conv2d):
    """Overrides what its forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Splits(nn.Linear):
    """Has a method of a name that a crossbar layer needs."""

    def split(self):
        return self.weight.chunk(2)


class Wide(nn.Linear):
    """Has an attribute of such a name."""

    def __init__(self, *args):
        super().__init__(*args)
        self.width = 3


def test_what_computes_otherwise_or_needs_names_of_a_crossbar_stays_digital(caplog):
    model = nn.Sequential(Standardized(3, 3, 1), nn.Flatten(), Splits(3, 3), Wide(3, 3), nn.Linear(3, 2))
    patch_model(model, straight())
    assert list(crossbar_layers(model)) == ["4"]
    for text in ("0 (Standardized has a forward, or a part of it, of its own)", "2 (", ": split)", "3 (", ": width)"):
        assert text in caplog.text
    assert model[3].width == 3 and len(model[2].split()) == 2


def test_the_closest_registered_class_counts():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Further(Doubling):
        pass

    @register_crossbar(Doubling)
    class CrossbarDoubling(CrossbarLayer, Doubling):
        output_dim, input_dim, channel_dim = 0, 1, -1

        def multiply(self, x, weight, bias, padded=False):
            return 2 * F.linear(x, weight, bias)

    model = nn.Sequential(Further(4, 3))
    x = torch.randn(5, 4)
    expected = model(x)
    patch_model(model, straight())
    assert isinstance(model[0], CrossbarDoubling)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("digital", ["Conv1d", "", "a.", "a.1b", nn.Module, 3])
def test_what_no_layer_can_be_is_refused(digital):
    with pytest.raises(TypeError, match=r"allowed is a class of layers, or 'package\.ClassName'"):
        register_crossbar(digital)


def test_a_kind_with_the_forward_of_the_digital_layer_is_refused():
    class Backwards(nn.Conv1d, CrossbarLayer):
        output_dim, input_dim, channel_dim = 0, 1, -2
        multiply, windows = CrossbarConvTime.multiply, CrossbarConvTime.windows

    with pytest.raises(TypeError, match="Backwards has the forward of Conv1d: derive it from CrossbarLayer first"):
        register_crossbar(nn.Conv1d)(Backwards)


def test_a_kind_that_reads_windows_must_say_which():
    class Windowless(CrossbarLayer, nn.Conv1d):
        output_dim, input_dim, channel_dim = 0, 1, -2
        multiply = CrossbarConvTime.multiply

    with pytest.raises(TypeError, match="Windowless lacks windows"):
        register_crossbar(nn.Conv1d)(Windowless)


def test_a_layer_without_a_bias_is_named():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x @ self.weight.T

    class CrossbarScaling(CrossbarLayer, Scaling):
        output_dim, input_dim, channel_dim = 0, 1, -1

        def multiply(self, x, weight, bias, padded=False):
            return F.linear(x, weight, bias)

    register_crossbar(Scaling)(CrossbarScaling)
    model = nn.Sequential(Scaling())
    with pytest.raises(TypeError, match="layer '0' of CrossbarScaling has no bias"):
        patch_model(model, ReRAMConfig())
    assert type(model[0]) is Scaling
