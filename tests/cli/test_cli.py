import json

import pytest
from typer.testing import CliRunner

from hf_reram.cli import app
from hf_reram.version import __version__
from tests.samples import images as image_sample


def test_version_and_help(python):
    assert __version__ in CliRunner().invoke(app, ["--version"]).output
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    assert python.run("-m", "hf_reram", "--version").stdout.strip() == __version__


def test_eval_and_inspect_of_a_plain_checkpoint(tmp_path):
    image_sample.save_model(tmp_path / "base")
    image_sample.dataset(16).to_parquet(tmp_path / "images.parquet")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "images.parquet"), "--chips", "2"]
    command += ["--times", "1s,10y", "--temperature", "300", "--temperature", "360", "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--device", "cmo-hfox-ibm", "--redundancy", "0.1", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["config"]["redundancy"] == 0.1 and report["config"]["retention_times"] == ["1s", "10y"]
    assert len(report["measurements"]) == 8 and report["notes"][-1] == "calibrated on the evaluated inputs"
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 1000
    assert "| accuracy | 360 K |" in (tmp_path / "out" / "robustness.md").read_text()
    shown = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "base"), "--device", "cmo-hfox-ibm", "--json", "--top", "3"]
    )
    assert len(json.loads(shown.stdout)["layers"]) == 3


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{}", "--dataset", "{}/nothing.parquet", "--device", "cmo-hfox-ibm"],
        ["eval", "{}", "--dataset", "{}", "--device", "no-such-cell"],
        ["inspect", "{}/nowhere"],
        ["inspect", "{}", "--device", "cmo-hfox-ibm", "--time", "soon"],
        ["card", "{}/nowhere"],
        ["card", "{}"],
        ["push", "{}", "me/model"],
    ],
    ids=lambda command: " ".join(command),
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(tmp_path, command, capfd):
    image_sample.save_model(tmp_path)
    done = CliRunner().invoke(app, [part.replace("{}", str(tmp_path)) for part in command])
    assert done.exit_code == 1
    assert capfd.readouterr().err.startswith("error: ") or "error: " in done.output
