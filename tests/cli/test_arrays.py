"""``hf-reram export``, an evaluation on what was read back, and what inspect says of arrays."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, calibrate, deploy, load_model, patch_model
from hf_reram.cli import app
from hf_reram.cli.output import console
from hf_reram.model.read_back import ReadBack
from tests.samples import images, lab
from tests.samples.devices import device


@pytest.fixture
def saved(tmp_path):
    model = patch_model(images.save_model(tmp_path / "model"), ReRAMConfig(device=device(programming=[0.5])))
    calibrate(model, [torch.randn(4, 3, 32, 32)]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def test_export_writes_targets_or_a_chip(saved, tmp_path):
    done = run("export", saved, tmp_path / "targets", "--formats", "safetensors")
    assert done.exit_code == 0 and "targets of cells; its README.md says what is where" in done.output.replace(
        "\n", " "
    )
    assert lab.about(tmp_path / "targets")["origin"] == "targets" and not list((tmp_path / "targets").glob("*.csv"))
    command = ["export", saved, tmp_path / "chip", "--seed", "3", "--time", "10y", "--temperature", "85C", "--json"]
    told = json.loads(run(*command).stdout)
    about = lab.about(tmp_path / "chip")
    assert told["folder"] == str(tmp_path / "chip") and told["seed"] == about["seed"] == 3
    assert told["cells"] == sum(entry["cells"] for entry in about["layers"].values())
    assert about["temperature"] == pytest.approx(358.15) and list((tmp_path / "chip").glob("*.csv"))
    model = load_model(saved)
    name, layer = next((name, layer) for name, layer in model.named_modules() if hasattr(layer, "chip"))
    with deploy(model, "10y", "85C", seed=3):
        held = layer.chip.weight.clone()
    assert torch.equal(ReadBack(model, tmp_path / "chip").chip(name, layer).weight, held)


def test_an_array_is_evaluated_beside_the_chips(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    images.dataset(16).to_parquet(tmp_path / "images.parquet")
    assert run("export", saved, tmp_path / "die 4").exit_code == 0
    lab.measure(tmp_path / "die 4", spread=0.5)
    command = ["eval", saved, "--dataset", tmp_path / "images.parquet", "--chips", "2", "--times", "1d"]
    command += ["--output", tmp_path / "out", "--conductances", tmp_path / "die 4"]
    done = run(*command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    (array,) = report["arrays"]
    assert array["name"] == "die 4" and array["origin"] == "measured" and len(report["measurements"]) == 2
    assert "accuracy on conductances that were read" in done.output
    shown = re.search(r"measured array die 4 after 1d at 300 K │ +([0-9.]+) │", done.output)
    assert shown and float(shown[1]) == pytest.approx(array["metrics"]["accuracy"], abs=0.05)
    assert "each a single one and no part of the figures of simulated chips" in done.output
    assert "measured array die 4" in (tmp_path / "out" / "robustness.md").read_text()
    (log,) = (tmp_path / "out").glob("chips-*.jsonl")
    assert '"kind": "measured array"' in log.read_text()
    refused = run(*command, "--range-shrink", "0.5")
    assert refused.exit_code == 1 and "array for another range_shrink than the model's" in refused.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["export", "{}", "{out}", "--time", "1d"], "allowed are they with the seed of a chip"),
        (["export", "{}", "{}"], "allowed is a new or an empty folder"),
        (["export", "{}", "{out}", "--formats", "parquet"], "allowed are some of ['safetensors', 'csv']"),
        (["export", "{out}/nowhere", "{out}"], "is no folder"),
        (["eval", "{}", "--dataset", "{}/images.parquet", "--conductances", "{out}"], "is no folder of conductances"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(saved, tmp_path, command, told):
    images.dataset(8).to_parquet(f"{saved}/images.parquet")
    words = [part.replace("{}", saved).replace("{out}", str(tmp_path / "out")) for part in command]
    if "--conductances" in words:
        words += ["--output", str(tmp_path / "evaluated")]
    done = run(*words)
    assert done.exit_code == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_inspect_shows_tiles_and_the_shares_of_errors(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    images.dataset(8).to_parquet(tmp_path / "images.parquet")
    command = ["inspect", saved, "--time", "1d", "--top", "2"]
    alone = json.loads(run(*command, "--json").stdout)["layers"][0]
    assert set(alone["shares"]) == {"retention", "programming", "stuck cells"} and alone["tiles"] == 1
    data = ["--dataset", tmp_path / "images.parquet"]
    first = json.loads(run(*command, *data, "--json").stdout)["layers"][0]
    assert set(first["shares"]) == {"retention", "programming", "stuck cells", "read noise"}
    assert sum(first["shares"].values()) == pytest.approx(1)
    assert list(first["shares"].values()) == sorted(first["shares"].values(), reverse=True)
    text = run(*command, *data).output
    worst, share = next(iter(first["shares"].items()))
    assert f"{worst} {100 * share:.0f} %, " in text and "shares of errors" in text and "stuck cells" not in text
    assert "read noise and ADC come on top" in text and "nothing tells what read noise" in run(*command).output
