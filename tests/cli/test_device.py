"""``hf-reram fit`` and ``hf-reram device``."""

import json

import numpy as np
import pandas as pd
from typer.testing import CliRunner

from hf_reram import DeviceConfig
from hf_reram.cli import app


def tables(folder):
    """Reads and sweeps of 900 cells of 5 to 45 µS: a spread of a fiftieth of the conductance."""
    draw = np.random.default_rng(0)
    g, cells = draw.uniform(5, 45, 900), np.arange(900)
    reads = [
        pd.DataFrame(
            {"cell": cells, "time_h": hours, "conductance_uS": g + 0.02 * g * size * draw.standard_normal(900)}
        )
        for hours, size in ((0.0, 0.0), (0.01, 1.0), (1.0, 1.5), (24.0, 1.9))
    ]
    pd.concat(reads).to_csv(folder / "reads.csv.gz", index=False)
    v = np.linspace(-0.8, 0.8, 17)
    sweeps = [
        pd.DataFrame({"cell": k, "voltage_V": v, "current_uA": x * 0.3 * np.sinh(v / 0.3)})
        for k, x in enumerate(g[:20])
    ]
    pd.concat(sweeps).to_csv(folder / "iv.tsv", index=False, sep="\t")


def run(*command):
    return CliRunner().invoke(app, list(map(str, command)))


def test_fit_writes_a_device_and_its_plot(tmp_path):
    tables(tmp_path)
    out = tmp_path / "mine.json"
    done = run("fit", "--retention", tmp_path / "reads.csv.gz", "--iv", tmp_path / "iv.tsv", "--out", out)
    assert done.exit_code == 0, done.output
    assert "law in time: " in done.output and "v0 = 0.3 V" in done.output and "no column of temperatures" in done.output
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    cell = DeviceConfig.from_json(out)
    assert cell.name == "mine" and abs(cell.v0 - 0.3) < 1e-3
    assert abs(float(cell.retention_std(25.0, "1h")) - 0.75) < 0.1
    shown = run(
        "fit", "--retention", tmp_path / "reads.csv.gz", "--out", out, "--model", "log", "--g-max", 40, "--json"
    )
    assert json.loads(shown.stdout)["retention"]["type"] == "log" and json.loads(shown.stdout)["g_max"] == 40


def test_fit_says_in_one_line_what_is_wrong(tmp_path):
    tables(tmp_path)
    table = pd.read_csv(tmp_path / "reads.csv.gz").rename(columns={"conductance_uS": "conductance_S"})
    table.to_csv(tmp_path / "wrong.csv", index=False)
    done = run("fit", "--retention", tmp_path / "wrong.csv", "--out", tmp_path / "mine.json")
    assert done.exit_code == 1 and "µS read as S" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "mine.json").exists()
    assert "nothing to fit" in run("fit", "--out", tmp_path / "mine.json").stderr


def test_device_tells_what_it_is(tmp_path):
    done = run("device", "cmo-hfox-ibm", "--times", "1s,10y", "--plot", tmp_path / "plots" / "cmo.png")
    assert done.exit_code == 0, done.output
    assert "window 9 to 89 µS" in done.output and "b = 0.8" in done.output and "0.412" in done.output
    assert (tmp_path / "plots" / "cmo.png").read_bytes()[:4] == b"\x89PNG"
    assert "no preset" in run("device", "mine").stderr


def test_device_tells_what_is_measured_held_and_extrapolated(tmp_path):
    found = json.loads(run("device", "rram-levy-c", "--times", "0.001,1s,10y", "--json").stdout)
    known = [one["known"] for one in found["retention"]]
    assert known == ["before the first", "", "extrapolated"]
    assert found["retention"][2]["g"] == [0, 10, 20, 30, 40]
    held = json.loads(run("device", "hfox-neurram", "--times", "10y", "--temperature", "85C", "--json").stdout)
    assert held["temperature"] == 358.15 and held["retention"][0]["known"] == "held, other temperature"
    cold = json.loads(run("device", "rram-levy-b", "--times", "1h", "--temperature=-40C", "--json").stdout)
    assert cold["retention"][0]["known"] == "other temperature"
    DeviceConfig.from_dict(found["device"]).to_json(tmp_path / "levy.json")
    done = run("device", tmp_path / "levy.json", "--plot", tmp_path / "levy.png")
    assert done.exit_code == 0 and "empirical (measured at 298.15 K; beyond the last time: variance)" in done.output
