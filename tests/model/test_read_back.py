"""Folders of conductances that are no array's of the model, and are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_reram import ReRAMConfig, calibrate, deploy, export_conductances, patch_model
from hf_reram.model import read_back
from hf_reram.model.likeness import correlation
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
    "version": ({"version": 1}, "version=1: allowed is 2"),
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
    refused(model, folder, "2 of 2 tiles are said to be measured, and are those that were exported")


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


@pytest.fixture
def tiled(tmp_path):
    """A model of 8 + 6 tiles whose cells drift, and its array as a lab has measured it."""
    model = made_of(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)))
    return model, lab.measure(export_conductances(model, tmp_path / "die"), spread=2.0)


def made_of(layers, **options):
    torch.manual_seed(0)
    options = {"device": device(**CELL), "tile_size": 4, **options}
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
    return calibrate(patch_model(layers.eval(), ReRAMConfig(**options)), [torch.randn(16, 32)])


def change_tile(folder, tile, change):
    """Of layer 0, by name of the polarity."""
    path = folder / "0.safetensors"
    tensors = load_file(path)
    names = {polarity: f"tile{tile}.{polarity}" for polarity in ("plus", "minus")}
    now = change(tensors, *(tensors[name] for name in names.values()))
    save_file(tensors | dict(zip(names.values(), (g.contiguous() for g in now))), path)


def swap_tiles(tensors, plus, minus):
    other = tensors["tile1.plus"], tensors["tile1.minus"]
    tensors["tile1.plus"], tensors["tile1.minus"] = plus, minus
    return other


DOUBTS = {
    "swapped tiles": (swap_tiles, ["tile 0", "tile 1"]),
    "polarity": (lambda _, plus, minus: (minus, plus), ["tile 0"]),
    "empty": (lambda _, plus, minus: (0 * plus, 0 * minus), ["tile 0"]),
    "rows": (lambda _, plus, minus: (plus.flip(0), minus.flip(0)), ["tile 0"]),
    "three times": (lambda _, plus, minus: (3 * plus, 3 * minus), ["tile 0"]),
    "right": (lambda _, plus, minus: (plus, minus), []),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_tiles_that_hold_something_else_are_named(tiled, monkeypatch, case):
    model, folder = tiled
    change, tiles = DOUBTS[case]
    change_tile(folder, 0, change)
    said = []
    monkeypatch.setattr("hf_reram.model.deploy.logger.warning", lambda text, *args: said.append(text % args))
    for _ in range(2):
        with deploy(model, conductances=folder):
            pass
    assert len(said) == bool(tiles)
    for line in said:
        assert line.startswith(
            f"measured array die after 1d at 300 K hardly holds what it was to hold in {len(tiles)} "
        )
        assert [f"tile {i}" for i in range(8) if f"tile {i} of layer '0'" in line] == tiles


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "mS"), (1e-6, "S")])
def test_one_tile_in_another_unit_is_refused(tiled, factor, unit):
    model, folder = tiled
    change_tile(folder, 2, lambda _, plus, minus: (factor * plus, factor * minus))
    with pytest.raises(ValueError, match=f"of 1 tiles are far below .* in {unit}. tile 2 of layer '0'"):
        deploy(model, conductances=folder).__enter__()


@pytest.mark.parametrize("preset", ["hfox-neurram", "cmo-hfox-ibm", "rram-levy-b", "rram-levy-c"])
def test_arrays_as_the_device_ages_are_in_no_doubt(tmp_path, preset):
    """A simulated chip's conductances, as if they had been read from an array that was programmed to the targets."""
    model = made_of(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)), device=preset)
    targets = export_conductances(model, tmp_path / "die", formats=["safetensors"])
    chip = export_conductances(model, tmp_path / "chip", "1d", "25C", seed=4, formats=["safetensors"])
    for path in chip.glob("*.safetensors"):
        path.replace(targets / path.name)
    lab.say(targets, origin="measured", time="1d", temperature="25C")
    array = read_back.ReadBack(model, targets)
    array.digest(model)
    assert not array.notes()


NOT_READ = {
    "all but a tile": (lambda tile, g: g + 0.3 * (tile == 0), 12),
    "all but a cell": (lambda tile, g: g + 1e-3 * (torch.arange(g.numel()).view(g.shape) == 0), 14),
    "five digits": (lambda tile, g: torch.tensor([float(f"{x:.5g}") for x in g.flatten()]).view(g.shape), 14),
    "a fifth of a tile": (lambda tile, g: g + 0.3 * ((torch.arange(g.numel()).view(g.shape) % 5 > 0) | (tile > 0)), 2),
}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("case", NOT_READ)
def test_tiles_that_were_not_read_are_refused(tiled, tmp_path, case, seed):
    """Also where a simulated chip was exported, which is drawn anew to be compared with."""
    model, _ = tiled
    change, count = NOT_READ[case]
    folder = export_conductances(model, tmp_path / "half", seed=seed, formats=["safetensors"])
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: change(int(name[4]), g) for name, g in tensors.items()}, path)
    lab.say(folder, origin="measured", time="1d", temperature=300)
    with pytest.raises(ValueError, match=f"{count} of 14 tiles are said to be measured, and are those that were expo"):
        deploy(model, conductances=folder).__enter__()


@pytest.mark.parametrize(
    ("cells", "low", "taken"), [(15, -0.39, True), (1, -1e-4, True), (16, -0.1, False), (1, -0.41, False)]
)
def test_slightly_negative_readings_are_0(tiled, cells, low, taken):
    """Of 1,536 cells, whose window is 40 µS."""
    model, folder = tiled

    def change(_, plus, minus):
        plus.flatten()[:cells] = low
        return plus, minus

    change_tile(folder, 3, change)
    array = read_back.ReadBack(model, folder)
    if not taken:
        with pytest.raises(ValueError, match=f"layer '0': {cells} of 1536 conductances are negative, the first one"):
            array.digest(model)
        return
    array.digest(model)
    note = f"{array}: {cells} negative conductances of layer '0', down to {low:g} µS, are taken as 0"
    assert array.notes() == [note]
    assert float(array.array("0", model[0]).min()) == 0


@pytest.mark.parametrize(
    ("place", "value"), [(("output", "weight_scale"), 1.0), (("input", "range"), 99.0), (("v0_V",), 0.3)]
)
def test_how_layers_are_driven_and_read_stays_as_it_was(model, folder, place, value):
    about = lab.about(folder)
    *path, last = place
    entry = about["layers"]["a"]
    for name in path:
        entry = entry[name]
    entry[last] = value
    lab.say(folder, layers=about["layers"])
    refused(model, folder, "exported, layers: these are not what was exported")


def test_another_programs_json_is_the_same(model, folder):
    """Sorted, and 1.0 without its point."""
    about = json.loads(
        (folder / lab.JSON).read_text(), parse_float=lambda x: int(float(x)) if float(x) % 1 == 0 else float(x)
    )
    (folder / lab.JSON).write_text(json.dumps(about, sort_keys=True))
    with deploy(model, conductances=folder):
        pass


def test_correlation_is_of_what_is_held():
    a = torch.tensor([1.0, -2.0, 3.0])
    assert correlation(2 * a, a) == pytest.approx(1) and correlation(-a, a) == pytest.approx(-1)
    assert correlation(0 * a, a) == 0 and correlation(a, 0 * a) == 1


def test_a_simulated_chip_is_of_the_time_that_it_was_exported_for(model, tmp_path):
    folder = export_conductances(model, tmp_path / "chip", seed=3, time="1s")
    lab.say(folder, time="10y")
    refused(model, folder, "time='10y', temperature=.*, seed=3: this is not what was exported")
