import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, RobustnessReport, calibrate, evaluate_robustness, patch_model
from hf_reram.evaluation.report import Measurement
from tests.samples.models import bert_batch


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    patch_model(model, ReRAMConfig())
    return calibrate(model, [torch.randn(32, 8)])


def mean_square(model):
    with torch.no_grad():
        return {"power": float(model(torch.ones(3, 8)).square().mean()), "constant": 2.0}


def test_a_device_without_retention_drifts_in_the_report_which_names_what_is_assumed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    patch_model(model, ReRAMConfig(device={"g_min": 1, "g_max": 50, "v0": 0.25, "read_voltage": 0.2, "name": "mine"}))
    calibrate(model, [torch.randn(32, 8)])
    report = evaluate_robustness(model, mean_square, times=["1s", "10y"], seeds=2, progress=False)
    assert "assumed, not measured: retention" in report.notes
    found = [m.metrics["power"] for m in report.measurements]
    assert len(set(found)) == 4 and found[:2] != found[2:] and report.ideal["power"] not in found


def test_report_holds_every_chip_and_its_references(model, tmp_path):
    report = evaluate_robustness(
        model, mean_square, times=["1s", "1d"], temperatures=[300, 350], seeds=3, progress=False
    )
    assert len(report.measurements) == 12
    assert report.digital["constant"] == report.ideal["constant"] == 2.0
    values = [m.metrics["power"] for m in report.measurements if (m.time, m.temperature) == (86400.0, 350)]
    found = report.statistic("power", "1d", 350)
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert found.ci95 == pytest.approx(4.302653 * found.std / math.sqrt(3), rel=1e-5)  # Student's t, 2 degrees
    report.to_json(tmp_path / "r.json")
    again = RobustnessReport.from_json(tmp_path / "r.json")
    assert again.to_dict() == report.to_dict()
    table = report.to_markdown()
    assert "| 1s | 1d |" in table
    assert "350 K" in table
    assert "assumed" in table.lower()


def test_ten_chips_by_default_and_retention_beyond_the_measured_times_is_noted(model):
    with pytest.warns(UserWarning, match="held"):
        report = evaluate_robustness(model, mean_square, times=["10y"], progress=False)
    assert report.statistic("power", "10y").chips == 10
    assert any("held" in note for note in report.notes)
    with pytest.warns(UserWarning, match="first value"):
        report = evaluate_robustness(model, mean_square, times=[0.1, "1s"], seeds=1, progress=False)
    assert [note for note in report.notes if "measured value" in note] == [
        "retention at 0.1 s is the first measured value, of a later time"
    ]


def test_plot_is_a_png_of_several_models(tmp_path):
    def report(offset):
        chips = [Measurement(t, None, s, {"f1": 50 + offset + s}) for t in (1.0, 86400.0, 3.15576e8) for s in range(3)]
        return RobustnessReport(chips, digital={"f1": 60.0})

    path = report(0).plot(tmp_path / "sub" / "p.png", report(5), labels=["a", "b"], title="t")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="labels"):
        report(0).plot(tmp_path / "q.png", report(1), labels=["a"])


@pytest.mark.parametrize(
    "wrong", [{"times": []}, {"times": "1d"}, {"seeds": 0}, {"seeds": []}, {"temperatures": []}, {"temperatures": [-1]}]
)
def test_bad_arguments(model, wrong):
    with pytest.raises(ValueError, match="allowed"):
        evaluate_robustness(model, mean_square, progress=False, **wrong)


@pytest.mark.parametrize("result", [{}, {"f1": "high"}, None])
def test_bad_metrics(model, result):
    with pytest.raises(ValueError, match="evaluate returned"):
        evaluate_robustness(model, lambda m: result, progress=False)


def test_reports_that_are_none(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match="no robustness report"):
        RobustnessReport.from_json(tmp_path / "r.json")


def test_a_killed_evaluation_goes_on_where_it_stopped(tiny_bert, tmp_path):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"x": float(model(**bert_batch()).logits.sum())}

    log = tmp_path / "runs.jsonl"
    options = {"times": ["1s", "1d"], "seeds": 2, "progress": False, "resume": log}
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(tiny_bert, evaluate, **options)
    log.write_text(log.read_text() + '{"of": "cut o')
    resumed = evaluate_robustness(tiny_bert, evaluate, **options)
    assert len(calls) == 4 + 3
    again = evaluate_robustness(tiny_bert, evaluate, **{**options, "resume": None})
    assert resumed.to_dict() == again.to_dict()  # read noise too is that of the chip, whatever ran before
    with torch.no_grad():
        tiny_bert.classifier.weight.mul_(0.9)
    with pytest.raises(ValueError, match="other weights"):
        evaluate_robustness(tiny_bert, evaluate, **options)


def test_an_evaluation_that_changes_the_weights_is_refused(model):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:  # the ideal crossbar
            with torch.no_grad():
                model[0].weight.mul_(3)
        return mean_square(model)

    with pytest.raises(RuntimeError, match="changed while it was evaluated"):
        evaluate_robustness(model, evaluate, times=["1d"], seeds=2, progress=False)
    assert len(calls) == 2


def test_offloaded_weights_are_refused_before_anything_is_measured(model):
    model.append(nn.LayerNorm(4, device="meta"))
    with pytest.raises(ValueError, match="on the meta device"):
        evaluate_robustness(model, lambda model: pytest.fail("measured"), progress=False)


def test_runs_of_another_evaluation_are_not_taken_over(model, tmp_path):
    options = {"times": ["1d"], "seeds": 2, "progress": False, "resume": tmp_path / "log.jsonl"}
    first = evaluate_robustness(model, mean_square, key={"data": "A", "split": 1}, **options)
    again = evaluate_robustness(model, lambda m: pytest.fail("not again"), key={"split": 1, "data": "A"}, **options)
    assert again.measurements == first.measurements
    for key in ({"data": "B", "split": 1}, None):
        with pytest.raises(ValueError, match="another evaluation"):
            evaluate_robustness(model, mean_square, key=key, **options)
    with pytest.raises(ValueError, match="allowed is a JSON value"):
        evaluate_robustness(model, mean_square, key=object(), **options)


def test_one_metric_that_is_nan_is_shown_and_not_the_end(model, tmp_path, caplog):
    runs = []

    def evaluate(model):
        runs.append(mean_square(model))
        return {"loss": math.nan if len(runs) == 4 else float(len(runs)), "constant": 2.0}

    with caplog.at_level("WARNING", "hf_reram"):
        report = evaluate_robustness(model, evaluate, times=["1d"], seeds=3, progress=False)
    assert len(runs) == 5 and report.statistic("loss", "1d").mean == 4.0 and report.statistic("loss", "1d").chips == 2
    assert report.statistic("constant", "1d").chips == 3
    told = "loss is nan on chip 1 after 1d"
    assert told in report.notes and told in caplog.text and "Loss is nan on chip 1 after 1d." in report.to_markdown()
    report.to_json(tmp_path / "r.json")
    assert "NaN" not in (tmp_path / "r.json").read_text()
    again = RobustnessReport.from_json(tmp_path / "r.json")
    assert math.isnan(again.measurements[1].metrics["loss"]) and again.statistic("loss", "1d").mean == 4.0
    report.plot(tmp_path / "r.png", metric="loss")


def test_temperatures_may_be_texts(model):
    report = evaluate_robustness(model, mean_square, ["1d"], ["85C", 300], seeds=1, progress=False)
    assert report.temperatures == [358.15, 300.0]
    with pytest.raises(ValueError, match=r"temperature=85: allowed is 200 to 2000 K.*; 85 °C\? write '85C'"):
        evaluate_robustness(model, mean_square, ["1d"], [85], seeds=1, progress=False)
