import json

import pytest
from transformers import DeiTForImageClassification

from hf_reram import ReRAMConfig, RobustnessReport, crossbar_layers, patch_model, summarize
from hf_reram.tasks import demo

pytest.importorskip("sklearn")


def test_demo_runs_the_whole_path(tmp_path, monkeypatch):
    digits = demo.Digits.load()
    few = demo.Digits(tuple(part[:128] for part in digits.train), tuple(part[:64] for part in digits.test))
    monkeypatch.setattr(demo.Digits, "load", lambda: few)
    monkeypatch.setattr(demo, "METHODS", (demo.METHODS[0], demo.METHODS[-1]))
    reports = demo.run_demo(tmp_path, chips=2, base_epochs=1, epochs=1, redundancy=0.2, progress=lambda _: None)
    assert list(reports) == ["naive crossbar", "hf_reram"]
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report.json").read_text()).keys() == reports.keys()
    assert "| digital base | – |" in (tmp_path / "report.md").read_text()
    assert RobustnessReport.from_json(tmp_path / "checkpoint" / "robustness.json").metrics == ["accuracy"]
    model = DeiTForImageClassification.from_pretrained(tmp_path / "checkpoint")
    weights = 2 * sum(layer.weight.numel() for layer in crossbar_layers(model).values())
    assert 1.15 * weights < summarize(model).cells <= 1.2 * weights
    with pytest.raises(RuntimeError, match="something else"):
        demo.check_reload(patch_model(demo.small_deit(), ReRAMConfig()), tmp_path / "checkpoint", few)
