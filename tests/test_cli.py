import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, RobustnessReport, patch_model
from hf_reram.cli import app
from hf_reram.version import __version__


def test_version_and_help():
    assert __version__ in CliRunner().invoke(app, ["--version"]).output
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    done = subprocess.run([sys.executable, "-m", "hf_reram", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_demo_runs_the_whole_path(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from hf_reram import demo

    monkeypatch.setattr(demo, "METHODS", (demo.METHODS[0], demo.METHODS[-1]))
    reports = demo.run_demo(tmp_path, chips=2, base_epochs=3, epochs=1, progress=lambda _: None)
    assert list(reports) == ["naive crossbar", "hf_reram"]
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report.json").read_text()).keys() == reports.keys()
    assert "| digital base | – |" in (tmp_path / "report.md").read_text()
    assert RobustnessReport.from_json(tmp_path / "checkpoint" / "robustness.json").metrics == ["accuracy"]
    with pytest.raises(RuntimeError, match="something else"):
        demo.check_reload(patch_model(demo.small_deit(), ReRAMConfig()), tmp_path / "checkpoint", demo.Digits.load())
