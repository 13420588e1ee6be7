"""Arrays whose conductances were read, evaluated beside simulated chips and never taken for some."""

import json

import pytest
import torch
from torch import nn

from hf_reram import (
    ReRAMConfig,
    RobustnessReport,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    export_conductances,
    patch_model,
)
from hf_reram.device import parse_time
from hf_reram.evaluation import plot
from hf_reram.evaluation.report import ArrayMeasurement
from hf_reram.hub.card import _limits
from tests.samples import lab
from tests.samples.devices import device

X = torch.linspace(-1, 1, 48).view(6, 8).sin()


def made(**cells):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    return calibrate(patch_model(model, ReRAMConfig(device=device(read_noise=0.0, **cells))), [X])


@torch.no_grad()
def power(model):
    return {"power": float(model(X).square().mean())}


def report_of(model, **options):
    return evaluate_robustness(model, power, ["1s", "1d"], seeds=3, progress=False, **options)


@pytest.fixture
def model():
    return made()


@pytest.fixture
def folder(model, tmp_path):
    return lab.measure(export_conductances(model, tmp_path / "array 7"), spread=1.0)


def test_an_array_stands_beside_the_chips_and_in_no_mean(model, folder, tmp_path):
    alone, report = report_of(model), report_of(model, conductances=folder)
    assert report.measurements == alone.measurements and report.times == alone.times
    assert report.statistic("power", "1d") == alone.statistic("power", "1d") and report.metrics == ["power"]
    (array,) = report.arrays
    with deploy(model, conductances=folder):
        expected = power(model)
    assert array.metrics == expected and expected["power"] not in {m.metrics["power"] for m in report.measurements}
    assert (array.name, array.origin, array.time, array.temperature) == ("array 7", "measured", 86400.0, 300.0)
    report.to_json(tmp_path / "report.json")
    back = RobustnessReport.from_json(tmp_path / "report.json")
    assert back.arrays == report.arrays and json.loads((tmp_path / "report.json").read_text())["arrays"][0]["name"]
    text = report.to_markdown()
    assert f"| measured array array 7 after 1d at 300 K | {expected['power']:.3f} |" in text
    assert (
        "each a single one and no part of the figures of simulated chips" in text and "Nothing was measured" not in text
    )
    assert text.startswith(alone.to_markdown().rstrip("\n"))
    assert any("On the measured array array 7 after 1d at 300 K, no simulated chip" in line for line in _limits(report))


def test_what_was_not_measured_says_so(model, tmp_path):
    chip = export_conductances(model, tmp_path / "chip", "1d", seed=2)
    targets = export_conductances(model, tmp_path / "targets")
    report = report_of(model, conductances=[chip, str(targets)])
    assert [array.origin for array in report.arrays] == ["simulated", "targets"]
    same = next(m for m in report.measurements if (m.time, m.seed) == (86400.0, 2))
    assert report.arrays[0].metrics == same.metrics
    assert report.arrays[1].metrics["power"] == pytest.approx(report.ideal["power"], rel=1e-5)
    text = report.to_markdown()
    assert "simulated array chip after 1d at 298.15 K" in text and "| target array targets |" in text
    assert "Nothing was measured of chip, targets." in text


def test_a_run_log_tells_arrays_from_chips(model, folder, tmp_path):
    log, ran = tmp_path / "runs.jsonl", []

    def counted(model):
        ran.append([layer.chip is not None for layer in crossbar_layers(model).values()])
        return power(model)

    first = evaluate_robustness(
        model, counted, ["1d"], seeds=2, progress=False, resume=log, key=1, conductances=folder, references=False
    )
    assert ran == [[True, True]] * 3
    runs = [json.loads(line)["run"] for line in log.read_text().split("\n") if line]
    assert [run["kind"] for run in runs] == ["chip", "chip", "measured array"]
    assert runs[2]["conductances"] == first.arrays[0].conductances and "conductances" not in runs[0]
    again = evaluate_robustness(
        model, counted, ["1d"], seeds=2, progress=False, resume=log, key=1, conductances=folder, references=False
    )
    assert again.arrays == first.arrays and len(ran) == 3
    lab.measure(folder, spread=0.5, seed=1)
    third = evaluate_robustness(
        model, counted, ["1d"], seeds=2, progress=False, resume=log, key=1, conductances=folder, references=False
    )
    assert len(ran) == 4 and third.arrays[0].metrics != first.arrays[0].metrics


def test_conductances_that_change_meanwhile_are_refused(model, folder):
    def meddling(model):
        figures = power(model)
        lab.measure(folder, spread=0.5, seed=1)
        return figures

    with pytest.raises(ValueError, match="conductances of layer '0' changed while they were used"):
        evaluate_robustness(model, meddling, ["1d"], seeds=1, progress=False, conductances=folder)


def test_foreign_and_repeated_folders_are_refused_before_anything_runs(model, folder, tmp_path):
    ran = []
    with pytest.raises(ValueError, match="hold the same, which would count as two arrays"):
        evaluate_robustness(model, ran.append, ["1d"], seeds=1, progress=False, conductances=[folder, folder])
    other = made(g_max=41.0)
    with pytest.raises(ValueError, match="array for another device than the model's"):
        evaluate_robustness(other, ran.append, ["1d"], seeds=1, progress=False, conductances=folder)
    assert not ran
    with pytest.raises(ValueError, match="the same conductances are those of target array a, measured array b"):
        RobustnessReport([], arrays=[of("a", "targets", None), of("b", "measured", 1.0)])


def of(name, origin, time, figures=None):
    return ArrayMeasurement(name, origin, time, None, "digest", figures or {"power": 1.0})


def test_a_wrong_order_is_a_note(model, folder):
    path = folder / "0.safetensors"
    lab.save_file({name: g[::-1].copy() for name, g in lab.load_file(path).items()}, path)
    notes = report_of(model, conductances=folder).notes
    (note,) = (note for note in notes if "hardly" in note)
    assert note.startswith(
        "measured array array 7 after 1d at 300 K hardly holds what it was to hold in 1 of 2 tiles: "
    )
    assert "tile 0 of layer '0' (correlation " in note


@pytest.mark.parametrize(
    ("preset", "time", "what"),
    [
        ("hfox-neurram", "10y", "is the last measured value, held"),
        ("hfox-neurram", "1d", None),
        ("rram-levy-c", "10y", "is extrapolated beyond what was measured"),
    ],
)
def test_simulated_arrays_say_where_retention_was_not_measured(tmp_path, preset, time, what):
    """Of their own time, whatever the chips' is: in the folder, a warning, and the report."""
    layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    model = calibrate(patch_model(layers, ReRAMConfig(device=preset)), [X])
    folder = export_conductances(model, tmp_path / "chip", time, seed=3, formats=["safetensors"])
    expected = [f"retention at {parse_time(time):g} s, 298.15 K {what}"] if what else []
    assert lab.about(folder)["exported"]["notes"] == expected
    told = f"{time} after programming at 298.15 K{''.join(f'; {note}' for note in expected)}. Nothing here was measured"
    assert told in (folder / "README.md").read_text()
    notes = evaluate_robustness(model, power, ["1s"], seeds=1, progress=False, conductances=folder).notes
    prefix = f"simulated array chip after {time} at 298.15 K: "
    assert [note for note in notes if note.startswith(prefix)] == [prefix + note for note in expected]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"origin": "a chip"}, r"arrays\[0\]: origin='a chip': allowed is one of"),
        ({"time": -1}, r"arrays\[0\]: time=-1"),
        ({"metrics": {}}, r"arrays\[0\]: metrics="),
    ],
)
def test_a_strangers_arrays_are_looked_at(model, folder, change, told):
    data = report_of(model, conductances=folder, references=False).to_dict()
    data["arrays"][0] |= change
    with pytest.raises(ValueError, match=told):
        RobustnessReport.from_dict(data)


def test_names_are_no_markup(model, folder):
    lab.say(folder, array="a|b [x](http://y)")
    text = report_of(model, conductances=folder).to_markdown()
    assert "[x](http" not in text and r"a\|b" in text


def test_arrays_are_stars_in_the_plot(model, folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    report = report_of(model, conductances=folder)
    report.arrays.append(ArrayMeasurement("no time", "targets", None, None, "other", {"power": 2.0}))
    report.plot(tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "*"]
    assert stars == [(86400.0, report.arrays[0].metrics["power"]), (plot.FIRST, 2.0)]
    assert [note.get_text() for note in axes.texts] == [
        "measured array array 7 after 1d at 300 K",
        "target array no time",
    ]
