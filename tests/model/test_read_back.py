"""Folders of conductances that are no array's of the model, and are refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_reram import ReRAMConfig, calibrate, deploy, export_conductances, patch_model
from hf_reram.model import read_back
from tests.samples import lab
from tests.samples.devices import device

CELL = {"read_noise": 0.0}
X = torch.linspace(-1, 1, 48).view(6, 8).sin()


class Few(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.a(self.norm(x)).relu())


def made(seed=0, x=X, **options):
    torch.manual_seed(seed)
    return calibrate(patch_model(Few().eval(), ReRAMConfig(device=device(**CELL), **options)), [x])


@pytest.fixture
def model():
    return made()


@pytest.fixture
def folder(model, tmp_path):
    return lab.measure(export_conductances(model, tmp_path / "array"))


def refused(model, folder, told):
    with pytest.raises(ValueError, match=told), deploy(model, conductances=folder):
        pass
    assert model.a.chip is None and model.a.crossbar.chips == 0


def test_the_array_is_what_the_layers_hold_and_nothing_is_left(model, folder):
    with torch.no_grad(), deploy(model, conductances=str(folder)):
        assert model.a.chip is not None
        first = model(X)
    assert model.a.chip is None and not torch.equal(first, model(X))
    lab.measure(folder, spread=2.0, seed=1)
    with torch.no_grad(), deploy(model, conductances=folder):
        assert not torch.allclose(model(X), first)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: made(seed=1), "exported from other weights than the model's"),
        (lambda: made(x=3 * X), "exported from another calibration than the model's"),
        (lambda: made(tile_size=4), "an array for another tile_size than the model's"),
        (lambda: made(adc_bits=8), "an array for another adc_bits than the model's"),
    ],
    ids=["weights", "calibration", "tiles", "converters"],
)
def test_a_foreign_folder_is_refused(folder, other, told):
    refused(other(), folder, told)


def test_another_models_folder_is_refused(folder):
    sequence = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    calibrate(patch_model(sequence, ReRAMConfig(device=device(**CELL))), [X])
    told = "another model's conductances: it has layers 'a', 'b'; it lacks '0', '1'"
    with pytest.raises(ValueError, match=told), deploy(sequence, conductances=folder):
        pass


def test_weights_outside_of_the_crossbars_count_too(model, folder):
    with torch.no_grad():
        model.norm.weight[3] += 0.1
    refused(model, folder, "exported from other weights than the model's")


def test_a_missing_layer_is_named(model, folder):
    (folder / "b.safetensors").unlink()
    refused(model, folder, "lacks the conductances of 1 of 2 layers, .*: 'b'")


def test_no_folder_and_no_such_file_are_named(model, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no folder of conductances"), deploy(model, conductances=path):
            pass


@pytest.mark.parametrize("given", [{"time": "1d"}, {"temperature": 300.0}, {"seed": 2}], ids=str)
def test_the_folder_says_when_it_was_read(model, folder, given):
    with pytest.raises(ValueError, match="allowed are no others than the folder says"):
        deploy(model, conductances=folder, **given).__enter__()


def changed(folder, change):
    path = folder / "a.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def put(value):
    def change(tensors):
        tensors["tile0.minus"][2, 3, 0] = value

    return change


def times(factor):
    def change(tensors):
        for g in tensors.values():
            g *= factor

    return change


def reshape(tensors):
    tensors["tile0.plus"] = tensors["tile0.plus"].mT.contiguous()


def transpose(tensors):
    tensors["tile0.plus"] = tensors["tile0.plus"].transpose(0, 1).contiguous()


def integers(tensors):
    tensors["tile0.plus"] = tensors["tile0.plus"].int()


IMPOSSIBLE = {
    "NaN": (put(torch.nan), "layer 'a': 1 of 96 conductances are NaN or infinite, the first one in row 2, column 3"),
    "infinite": (put(torch.inf), "are NaN or infinite"),
    "negative": (put(-0.5), r"1 of 96 conductances are negative, .* pair 0, minus \(-0.5\): allowed are finite ones"),
    "absurd": (put(1e4), "1 of 96 conductances are above 400 µS, 10 times g_max"),
    "nS": (times(1e3), "above 400 µS"),
    "pairs": (reshape, r"tile0.plus is \(8, 1, 6\) of float32: allowed are \(8, 6, 1\)"),
    "transposed": (transpose, r"tile0.plus is \(6, 8, 1\) of float32"),
    "integers": (integers, "of int32: .* of a floating-point type"),
    "name": (lambda tensors: tensors.pop("tile0.plus"), "allowed are .'tile0.minus', 'tile0.plus'."),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_no_cell_can_have_is_refused(model, folder, case):
    change, told = IMPOSSIBLE[case]
    changed(folder, change)
    refused(model, folder, told)


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "mS"), (1e-6, "S")])
def test_other_units_are_refused(model, folder, factor, unit):
    for path in folder.glob("*.safetensors"):
        save_file({name: g * factor for name, g in load_file(path).items()}, path)
    refused(model, folder, f"the largest conductance is .* where g_max is 40 µS: are these in {unit}\\?")


def test_a_file_that_is_none_is_named(model, folder):
    (folder / "a.safetensors").write_bytes(b"no tensors")
    refused(model, folder, "a.safetensors cannot be read")


SAID = {
    "unit": ({"unit": "S"}, "unit='S': allowed is µS"),
    "origin": ({"origin": "simulated"}, "origin='simulated', time='1d', .*: this is not what was exported"),
    "origin and time": (
        {"origin": "targets", "time": None, "temperature": None},
        "layer 'a' are no longer those that were exported: .* is to be \"measured\"",
    ),
    "no origin": ({"origin": None}, "origin=None: allowed is one of"),
    "no time": ({"time": None}, "time=None: allowed, of conductances that were measured, are seconds"),
    "no heat": ({"temperature": None}, "temperature=None: allowed, of conductances that were measured, are K"),
    "time": ({"time": "soon"}, "is not a time"),
    "heat": ({"temperature": -3}, "temperature=-3"),
    "name": ({"array": 7}, "array=7: allowed is a text"),
    "version": ({"version": 2}, "version=2: allowed is 1"),
    "format": ({"format": "a report"}, "it says nothing of conductances"),
    "configs": ({"configs": []}, "configs=.*: allowed are 1"),
    "layers": ({"layers": [1]}, "layers: allowed is an object"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_the_folder_says_is_looked_at(model, folder, case):
    said, told = SAID[case]
    lab.say(folder, **said)
    refused(model, folder, told)


def test_no_json_is_refused(model, folder):
    (folder / lab.JSON).write_text("{")
    refused(model, folder, "conductances.json: it is not valid JSON")


def test_what_was_exported_is_no_measurement(model, tmp_path):
    folder = export_conductances(model, tmp_path / "array", seed=3, time="1d")
    lab.say(folder, origin="measured")
    assert lab.about(folder)["temperature"] == device().reference_temperature
    refused(model, folder, "layer 'a' are said to be measured, and are bit for bit those that were exported")


def test_files_of_both_kinds_must_agree(model, tmp_path):
    folder = export_conductances(model, tmp_path / "array")
    (folder / "b.tile0.csv").rename(tmp_path / "kept.csv")
    changed(folder, put(3.0))
    lab.say(folder, origin="measured", time="1d", temperature=300)
    refused(model, folder, "layer 'a' in its CSV files are others than in its safetensors file")


def edit(folder, name, change):
    path = folder / name
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


CSV = {
    "unit": (lambda ls: ls.__setitem__(0, ls[0].replace("_uS", "_S")), "its first line is .* allowed is 'group"),
    "order": (lambda ls: ls.insert(1, ls.pop()), "has other rows, or in another order"),
    "rows": (lambda ls: ls.pop(), "has 7 rows of 16 numbers: allowed are 8 of 16"),
    "text": (lambda ls: ls.__setitem__(3, ls[3] + "?"), "a.tile0.csv cannot be read"),
    "NaN": (lambda ls: ls.__setitem__(3, ls[3].rpartition(",")[0] + ",nan"), "NaN or infinite, the first one in row 2"),
}


@pytest.mark.parametrize("case", CSV)
def test_csv_files_are_looked_at(model, tmp_path, case):
    folder = lab.measure(export_conductances(model, tmp_path / "array", formats=["csv"]), kind="csv")
    with deploy(model, conductances=folder):
        pass
    change, told = CSV[case]
    edit(folder, "a.tile0.csv", change)
    refused(model, folder, told)


def test_an_array_in_another_order_is_named(model, folder, monkeypatch):
    said = []
    monkeypatch.setattr("hf_reram.model.deploy.logger.warning", lambda text, *args: said.append(text % args))
    with deploy(model, conductances=folder):
        pass
    assert not any("hardly resembles" in line for line in said)
    changed(folder, lambda tensors: tensors.update({name: g.roll(3, 0).contiguous() for name, g in tensors.items()}))
    with deploy(model, conductances=folder):
        pass
    (line,) = [line for line in said if "hardly resembles" in line]
    assert line.startswith("1 of 2 crossbar layers hold on measured array array after 1d at 300 K what") and "a" in line


def test_correlation_is_of_what_is_held():
    a = torch.tensor([1.0, -2.0, 3.0])
    assert read_back.correlation(2 * a, a) == pytest.approx(1) and read_back.correlation(-a, a) == pytest.approx(-1)
    assert read_back.correlation(0 * a, a) == 0 and read_back.correlation(a, 0 * a) == 1


def test_a_simulated_chip_is_of_the_time_that_it_was_exported_for(model, tmp_path):
    folder = export_conductances(model, tmp_path / "chip", seed=3, time="1s")
    lab.say(folder, time="10y")
    refused(model, folder, "time='10y', temperature=.*, seed=3: this is not what was exported")
