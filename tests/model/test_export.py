import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from hf_reram import (
    ReRAMConfig,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    export_conductances,
    inspect_layers,
    patch_model,
    summarize,
)
from tests.samples import lab
from tests.samples.devices import device
from tests.samples.experts import mixtral, tokens
from tests.samples.layers import layer_of
from tests.samples.models import bert_batch

CELL = {"read_noise": 0.0, "programming": [0.5, 0.01], "stuck_at_min": 0.02}
MAPPINGS = {
    "default": {},
    "copies": {"redundancy": 0.5, "equalize_inputs": True, "center_inputs": True},
    "tiles and pairs": {"tile_size": 5, "redundancy": 1.0, "weight_scale": "per_tile", "dac_bits": 6, "adc_bits": 8},
    "per token": {"input_range": "per_token", "adc_bits": 7, "center_inputs": True},
}


def made(kind, **options):
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).eval()
    patch_model(model, ReRAMConfig(device=device(**CELL), **options))
    return calibrate(model, [x]), x


def vectors(layer, x) -> np.ndarray:
    """What meets a layer's array, (vectors, channels, kernel elements)."""
    windows = layer.windows(layer.pad(x))
    return windows.reshape(len(windows), layer.inputs, layer.area).numpy()


LAYERS = [
    "linear",
    "conv1d",
    {"kernel_size": (3, 5), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 4, "padding": 1},
]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_a_lab_computes_from_currents_what_the_chip_does(tmp_path, mapping, kind):
    model, x = made(kind, **MAPPINGS[mapping])
    layer, image = model[0], mapping == "per token" and model[0].reads_windows
    x = x[:1] if image else x
    export_conductances(model, tmp_path / "chip", time="1d", seed=3)
    with torch.no_grad(), deploy(model, "1d", seed=3):
        y = model(x)
    y = y.movedim(layer.channel_dim, -1).reshape(-1, layer.outputs).numpy()
    met = vectors(layer, x)
    found = lab.read(tmp_path / "chip", "0", met, image=image)
    beyond = np.abs(found - y) > 2e-5 * np.abs(y).max()
    assert np.mean(beyond) <= (0.01 if layer.crossbar.config.adc_bits else 0)  # float32 rounds to the other side
    np.testing.assert_array_equal(found, lab.read(tmp_path / "chip", "0", met, "csv", image))


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("formats", [["safetensors"], ["csv"], ["safetensors", "csv"]], ids=str)
def test_a_chip_that_was_exported_is_that_chip(tmp_path, mapping, formats):
    """Bit for bit."""
    model, x = made({"kernel_size": 3, "groups": 4, "padding": 1}, **MAPPINGS[mapping])
    if mapping == "copies":
        with torch.no_grad():
            model[0].row_copies[2:5] = torch.tensor([2.0, 3.0, 2.0])
    folder = export_conductances(model, tmp_path / "chip", time="10y", temperature="85C", seed=3, formats=formats)
    with torch.no_grad(), deploy(model, "10y", "85C", seed=3):
        y, held = model(x), model[0].chip.weight.clone()
    with torch.no_grad(), deploy(model, conductances=folder):
        assert torch.equal(model[0].chip.weight, held) and torch.equal(model(x), y)
    entry = lab.about(folder)
    assert entry["origin"] == "simulated" and entry["seed"] == 3 and entry["temperature"] == pytest.approx(358.15)
    assert entry["layers"]["0"]["cells"] == summarize(model).cells == inspect_layers(model, "1d")[0].cells
    assert {path.suffix[1:] for path in folder.iterdir()} == {"json", "md", *formats}
    told = "chip 3, 10y after programming at 358.15 K; retention at 3.15576e+08 s, 358.15 K is the last measured value,"
    assert told in (text := (folder / "README.md").read_text()) and "Nothing here was measured" in text


def test_targets_are_what_the_ideal_crossbar_holds(tmp_path):
    model, x = made("linear")
    folder = export_conductances(model, tmp_path / "targets")
    ((_, plus, minus),) = lab.tiles_of(folder, "0", "csv")
    assert ((plus == 0) | (minus == 0)).all()  # g_min of one of a pair
    scale = np.array(lab.about(folder)["layers"]["0"]["output"]["weight_scale"])
    weight = (plus - minus)[..., 0].T / device().g_range * scale[:, None]
    clipped = np.clip(model[0].weight.detach().numpy(), -scale[:, None], scale[:, None])
    np.testing.assert_allclose(weight, clipped, atol=1e-6)
    with torch.no_grad(), deploy(model, conductances=folder):
        held = model(x)
    torch.testing.assert_close(held, model(x), rtol=1e-5, atol=1e-5)
    assert lab.about(folder)["time"] is None and "to be programmed to" in (folder / "README.md").read_text()


def of_bert(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(device=device(**CELL)))
    return calibrate(tiny_bert, [bert_batch()]), bert_batch()


def of_experts(_):
    model, batch = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device=device(**CELL)))
    return calibrate(model, [batch]), batch


def of_attention(_):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    batch = torch.randn(4, 5, 16)
    patch_model(model, ReRAMConfig(device=device(**CELL)))
    return calibrate(model, [batch]), batch


class Tied(nn.Module):
    """Two layers of one weight, the second one's inputs ten times as large, and another layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(10 * self.a(x)))


def of_tied(_):
    model, batch = Tied(), torch.randn(40, 8)
    patch_model(model, ReRAMConfig(device=device(**CELL)))
    return calibrate(model, [batch]), batch


def run(model, batch):
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("kind", [of_bert, of_experts, of_attention, of_tied])
def test_whole_models_come_back(tmp_path, tiny_bert, kind):
    model, batch = kind(tiny_bert)
    folder = export_conductances(model, tmp_path / "chip", time="10y", seed=3)
    with deploy(model, "10y", seed=3):
        expected = run(model, batch)
    with deploy(model, conductances=folder):
        assert torch.equal(run(model, batch), expected)
    assert not torch.equal(run(model, batch), expected)
    layers = lab.about(folder)["layers"]
    assert layers.keys() == crossbar_layers(model).keys()
    own = [name for name, entry in layers.items() if entry["array"] == name]
    assert sum(layers[name]["cells"] for name in own) == summarize(model).cells
    if kind is of_tied:
        assert own == ["a", "c"] and layers["b"]["array"] == "a" and "files" not in layers["b"]
        assert layers["b"]["input"]["range"] > 2 * layers["a"]["input"]["range"]


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_what_is_read_back_is_what_the_layers_hold(tmp_path, kind):
    model, x = made(kind)
    folder = lab.measure(export_conductances(model, tmp_path / "array"), spread=0.5, kind="csv")
    with torch.no_grad(), deploy(model, conductances=folder):
        y = model(x)
    y = y.movedim(model[0].channel_dim, -1).reshape(-1, model[0].outputs).numpy()
    expected = lab.read(folder, "0", vectors(model[0], x), "csv")
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(y).max())


# What is refused


def test_nothing_half_written_is_left(tmp_path, monkeypatch, tiny_bert):
    model, _ = of_bert(tiny_bert)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("hf_reram.model.export.write_csv", fail)
    with pytest.raises(OSError, match="no space left"):
        export_conductances(model, tmp_path / "chip")
    assert not os.listdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "measured.csv").write_text("1")
    with pytest.raises(ValueError, match="allowed is a new or an empty folder; this one holds something"):
        export_conductances(model, tmp_path / "full", formats=["safetensors"])
    assert os.listdir(tmp_path / "full") == ["measured.csv"]
    (tmp_path / "empty").mkdir()
    assert (export_conductances(model, tmp_path / "empty", formats=["safetensors"]) / lab.JSON).is_file()
    assert os.stat(tmp_path / "empty").st_mode & 0o777 == os.stat(tmp_path / "full").st_mode & 0o777
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"time": "1d"}, "time='1d', temperature=None: allowed are they with the seed of a chip"),
        ({"temperature": 300.0}, "allowed are they with the seed of a chip"),
        ({"seed": -1}, "seed=-1: allowed is an integer from 0"),
        ({"seed": 1, "time": "soon"}, "is not a time"),
        ({"formats": "csv"}, "formats='csv': allowed are some of"),
        ({"formats": ["parquet"]}, "allowed are some of ..safetensors., .csv.."),
        ({"formats": []}, "allowed are some of"),
    ],
)
def test_bad_arguments_are_named(tmp_path, given, told):
    model, _ = made("linear")
    with pytest.raises(ValueError, match=told):
        export_conductances(model, tmp_path / "out", **given)
    assert not os.listdir(tmp_path)


def test_models_that_are_no_array_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no crossbar layers"):
        export_conductances(nn.Linear(2, 2), tmp_path / "out")
    model, _ = made("linear")
    with deploy(model), pytest.raises(ValueError, match=r"export its conductances outside of hf_reram.deploy"):
        export_conductances(model, tmp_path / "out")
    with digital(model), pytest.raises(ValueError, match=r"export its conductances outside of hf_reram.digital"):
        export_conductances(model, tmp_path / "out")
    layer, x = layer_of("linear")
    below = nn.Sequential(layer)
    patch_model(below, ReRAMConfig(device=device(floor_at_zero=False)))
    calibrate(below, [x])
    with pytest.raises(ValueError, match=r"layer '0': .* of 96 conductances are negative, the first one in row"):
        export_conductances(below, tmp_path / "out", seed=1, time="1d")
    assert not os.listdir(tmp_path)


def test_numbers_of_a_folder_are_plain_json(tmp_path):
    model, _ = made("linear", **MAPPINGS["tiles and pairs"])
    folder = export_conductances(model, tmp_path / "out")
    entry = json.loads((folder / lab.JSON).read_text(), parse_constant=pytest.fail)["layers"]["0"]
    assert entry["tiles"] == [{"rows": 5}, {"rows": 3}] and entry["pairs_per_weight"] == model[0].pairs > 1
    assert np.shape(entry["output"]["weight_scale"]) == (6, 2)
