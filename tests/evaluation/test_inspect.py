import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, digital, patch_model, summarize
from hf_reram.evaluation.inspect import inspect_layers
from hf_reram.nn.array import offset_output, program
from tests.samples.devices import SILENT, device
from tests.samples.models import bert_batch


def test_ratios_with_data_are_what_chips_show():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40)).eval()
    x = torch.randn(200, 64)
    patch_model(model, ReRAMConfig(device=device(v0=1e6, read_noise=0.0), weight_clip=None, retention_times=["1s"]))
    calibrate(model, [x])
    (found,) = inspect_layers(model, "1d", batches=[x[:100], x[100:]])
    with torch.no_grad():
        with digital(model):
            clean = model(x)
        errors = []
        for seed in range(200):
            with deploy(model, "1d", seed=seed):
                errors.append((model(x) - clean).square().sum())
        signal = (clean - model[0].bias).square().sum()
    assert found.noise_to_signal == pytest.approx(float(torch.stack(errors).mean() / signal), rel=0.03)
    assert (found.rows, found.columns, found.cells) == (64, 40, 2 * 64 * 40)


def test_the_worst_layers_come_first_and_nothing_is_left_changed(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    state = crossbar_layers(tiny_bert)["classifier"].crossbar
    error, before = state.error, tiny_bert(**bert_batch()).logits
    for batches in (None, [bert_batch()]):
        layers = inspect_layers(tiny_bert, "10y", 350.0, batches)
        ratios = [layer.noise_to_signal for layer in layers]
        assert len(layers) == 14 and ratios == sorted(ratios, reverse=True) and ratios[-1] > 0
        assert inspect_layers(tiny_bert, "1s", None, batches)[0].noise_to_signal < ratios[0]
    assert state.error is error and not tiny_bert.training and not state.measure
    assert not any(layer.training for layer in crossbar_layers(tiny_bert).values())
    assert torch.equal(tiny_bert(**bert_batch()).logits, before)


def test_bad_times_and_plain_models_are_refused(tiny_bert):
    with pytest.raises(ValueError, match="no crossbar layers"):
        inspect_layers(tiny_bert, "1d")
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(ValueError, match="is not a time"):
        inspect_layers(tiny_bert, "soon")


def of_kinds(kind):
    """Tokens of one size, and others of which some are ten thousand times as large."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"even": nn.Linear(8, 6), "massive": nn.Linear(8, 6)})
    x = torch.randn(400, 8)
    x = x / x.abs().amax(1, keepdim=True)
    batch = {"even": x, "massive": x * torch.logspace(0, 4, 400)[:, None]}
    whole = Both(model)
    patch_model(whole, ReRAMConfig(input_range=kind, dac_bits=8, adc_bits=8, center_inputs=False))
    return calibrate(whole, [batch]), batch


class Both(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, even, massive):
        return self.parts["even"](even), self.parts["massive"](massive)


@pytest.mark.parametrize(
    ("kind", "even", "massive"),
    [
        ("static", "static", "static"),
        ("auto", "static", "per_token"),
        ("per_token", "per_token", "per_token"),
        ("learned", "learned", "learned"),
    ],
)
def test_where_each_token_has_a_range_of_its_own_none_is_shown(kind, even, massive):
    model, batch = of_kinds(kind)
    found = {layer.name.removeprefix("parts."): layer for layer in inspect_layers(model, "1d")}
    assert {name: layer.range_kind for name, layer in found.items()} == {"even": even, "massive": massive}
    for name, layer in found.items():
        if layer.range_kind == "per_token":
            assert layer.input_range is None and "input_range=per token, b=" in repr(model.parts[name])
        else:
            largest = float(batch[name].abs().max())
            assert layer.input_range == pytest.approx(largest, rel=0.05)
            assert f"input_range={layer.input_range:.4g}, b=" in repr(model.parts[name])
    own = [even, massive].count("per_token")
    summary = summarize(model)
    assert summary.per_token == own and summary.calibrated == 2
    said = f"(2 calibrated, {own} with an input range per token)" if own else "(2 calibrated)"
    assert said in str(summary)


def test_a_range_that_is_not_calibrated_is_none():
    model = nn.Sequential(nn.Linear(4, 3))
    patch_model(model, ReRAMConfig())
    (found,) = inspect_layers(model, "1d")
    assert (found.range_kind, found.input_range) == ("static", None) and "input_range=not calibrated" in repr(model)


# What each source of error costs

ALL = {"programming": [0.4, 0.02], "stuck_at_min": 0.01, "stuck_at_max": 0.005, "read_noise": 0.4}
OFF = {"programming": [0.0], "stuck_at_min": 0.0, "stuck_at_max": 0.0, "read_noise": 0.0, "retention": SILENT}
ON = {
    "retention": {"retention": device().to_dict()["retention"]},
    "programming": {"programming": ALL["programming"]},
    "stuck cells": {name: ALL[name] for name in ("stuck_at_min", "stuck_at_max")},
    "read noise": {"read_noise": ALL["read_noise"]},
}
OF_LAYERS = {
    "linear": {},
    "tiles, per token": {"tile_size": 16, "weight_scale": "per_tile", "input_range": "per_token"},
    "pairs": {"tile_size": 1 << 10, "redundancy": 1.0},
    "convolution": {},
}


def layer_and_inputs(kind):
    torch.manual_seed(0)
    if kind == "convolution":
        return nn.Conv2d(4, 12, 3, padding=1), torch.randn(6, 4, 7, 7)
    return nn.Linear(48, 24), torch.randn(100, 48) * torch.rand(100, 1)


@pytest.mark.parametrize("kind", OF_LAYERS)
def test_each_source_is_what_chips_with_that_one_alone_show(kind):
    """And the ADC's what it changes."""
    options = {"weight_clip": None, "adc_bits": 6, "retention_times": ["1d"], **OF_LAYERS[kind]}
    layer, x = layer_and_inputs(kind)
    model = nn.Sequential(layer).eval()
    patch_model(model, ReRAMConfig(device=device(**ALL), **options))
    calibrate(model, [x])
    parts = x.split(len(x) // 2)
    (found,) = inspect_layers(model, "1d", batches=parts)

    def on(source):
        twin, _ = layer_and_inputs(kind)
        twin = nn.Sequential(twin).eval()
        cells = device(**{**OFF, **ON.get(source, {})})
        patch_model(twin, ReRAMConfig(device=cells, **{**options, "adc_bits": None}))
        twin.load_state_dict(model.state_dict())
        return twin

    with torch.no_grad():
        bias = model[0].bias
        if model[0].centered:
            bias = bias + offset_output(model[0], program(model[0], model[0].weight))[1]
        bias = model[0].over_channels(bias)
        clean, converted = on(None)(x), model(x)
        signal = (converted - bias).square().sum()
        expected = {"ADC": float((converted - clean).square().sum() / signal)}
        for source in ON:
            twin, errors = on(source), []
            for seed in range(150):
                with deploy(twin, "1d", seed=seed):
                    errors.append(float((twin(x) - clean).square().sum() / signal))
            expected[source] = sum(errors) / len(errors)
    assert found.sources.keys() == expected.keys()
    for source, ratio in expected.items():
        assert found.sources[source] == pytest.approx(ratio, rel=1e-3 if source == "ADC" else 0.06), source
    total = sum(expected.values())
    shares = sorted(((ratio / total, source) for source, ratio in expected.items()), reverse=True)
    assert list(found.shares) == [source for _, source in shares] and sum(found.shares.values()) == pytest.approx(1)
    assert list(found.shares.values()) == pytest.approx([share for share, _ in shares], abs=0.02)
    assert found.tiles == (3 if kind.startswith("tiles") else 1)
    of_cells = [found.sources[source] for source in ("retention", "programming", "stuck cells")]
    assert found.noise_to_signal == pytest.approx(sum(of_cells), rel=0.1)


def test_without_data_nothing_is_said_of_the_read_out():
    layer, x = layer_and_inputs("linear")
    model = nn.Sequential(layer).eval()
    patch_model(model, ReRAMConfig(device=device(**ALL), adc_bits=6))
    calibrate(model, [x])
    (found,) = inspect_layers(model, "1d")
    assert set(found.sources) == {"retention", "programming", "stuck cells"}
    assert found.noise_to_signal == pytest.approx(sum(found.sources.values()), rel=0.1)
    assert list(found.sources.values()) == sorted(found.sources.values(), reverse=True)
    assert model[0].crossbar.sources is None
    patched = nn.Sequential(nn.Linear(48, 24))
    patch_model(patched, ReRAMConfig(device=device(**{**ALL, "programming": [0.0]})))
    (less,) = inspect_layers(patched, "1d")
    assert less.sources["programming"] == 0 and less.shares["programming"] == 0
