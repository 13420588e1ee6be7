import json
import math
import re
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hf_reram import (
    DeviceConfig,
    ReRAMConfig,
    RobustnessReport,
    calibrate,
    deploy,
    evaluate_robustness,
    inspect_layers,
    patch_model,
)
from hf_reram.evaluation.report import Measurement
from hf_reram.evaluation.tables import comparison_table, metrics_table, over_chips
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_have_no_figures(value, dtype):
    """Nor are they calibrated or inspected; a mask may be infinite."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).to(dtype).eval()
    model.register_buffer("mask", torch.full((2,), -math.inf))
    calibrate(patch_model(model, ReRAMConfig()), [torch.randn(32, 8).to(dtype)])
    calls = [
        lambda: calibrate(model, [torch.randn(32, 8).to(dtype)]),
        lambda: inspect_layers(model, "1d"),
        lambda: evaluate_robustness(model, lambda model: {"constant": 1.0}, times=["1s"], seeds=1, progress=False),
    ]
    for broken in ("2.weight", "1.bias"):
        with torch.no_grad():
            tensor = model.get_parameter(broken)
            before = tensor.clone()
            tensor.view(-1)[3] = value
        for call in calls:
            with pytest.raises(ValueError, match=f"^NaN or infinite values are in {broken}: allowed are"):
                call()
        with torch.no_grad():
            tensor.copy_(before)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        model.register_buffer("graph", torch.eye(3).to_sparse(layout=layout), persistent=False)
        assert len(inspect_layers(model, "1d")) == 2
    model.graph = (torch.eye(3) * math.nan).to_sparse()
    with pytest.raises(ValueError, match="in graph: "):
        inspect_layers(model, "1d")
    del model.graph
    model[1].running_mean[0] = math.nan
    with pytest.raises(ValueError, match=r"in 1\.running_mean: "):
        inspect_layers(model, "1d")


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


def test_a_reference_temperature_that_is_no_rooms_is_noted():
    hot = replace(DeviceConfig.from_preset("cmo-hfox-ibm"), reference_temperature=373.15)
    model = patch_model(nn.Sequential(nn.Linear(8, 4)), ReRAMConfig(device=hot)).eval()
    told = "without another temperature cells are at 373.15 K"
    for heat, noted in ((None, True), ("25C", False)):
        report = evaluate_robustness(model, mean_square, ["1s"], [heat], 1, progress=False)
        assert (told in report.notes) == noted


def test_extrapolated_times_are_warned_of_as_held_ones_are():
    model = patch_model(nn.Sequential(nn.Linear(8, 4)), ReRAMConfig(device="rram-levy-c")).eval()
    told = "retention was measured up to 4 s; later times are extrapolated"
    with pytest.warns(UserWarning, match=told), deploy(model, "10y"):
        pass
    with pytest.warns(UserWarning, match=told):
        inspect_layers(model, "9y")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with deploy(model, "1s"):
            pass
        inspect_layers(model, 1.5)
    assert not any("extrapolated" in str(one.message) for one in found)


def test_notes_name_the_temperature_that_they_are_of_once(model):
    heats = ["25C", "85C"]
    with pytest.warns(UserWarning, match="held"):
        report = evaluate_robustness(model, mean_square, ["1s", "1h", "10y"], heats, 1, progress=False)
    assert [note for note in report.notes if note.startswith("retention at")] == [
        "retention at 3.15576e+08 s, 298.15 K is the last measured value, held",
        "retention at 358.15 K is that of 298.15 K at equivalent times, by an activation energy of 1 eV, which is "
        "assumed",
        "retention at 3600 s, 358.15 K is the last measured value, held",
        "retention at 3.15576e+08 s, 358.15 K is the last measured value, held",
    ]


def test_plot_is_a_png_of_several_models(tmp_path):
    def report(offset):
        chips = [Measurement(t, None, s, {"f1": 50 + offset + s}) for t in (1.0, 86400.0, 3.15576e8) for s in range(3)]
        return RobustnessReport(chips, digital={"f1": 60.0})

    path = report(0).plot(tmp_path / "sub" / "p.png", report(5), labels=["a", "b"], title="t")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="labels"):
        report(0).plot(tmp_path / "q.png", report(1), labels=["a"])


def test_reports_without_measurements_are_none_to_plot(tmp_path):
    good = RobustnessReport([Measurement(1.0, None, 0, {"f1": 50.0})])
    for reports in ([RobustnessReport([])], [good, RobustnessReport([])]):
        with pytest.raises(ValueError, match="holds no measurements of"):
            reports[0].plot(tmp_path / "p.png", *reports[1:])
    data = good.to_dict()
    data["measurements"][0]["metrics"] = {}
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"measurements\[0\]: metrics=\{\}: allowed is an object of at least one"):
        RobustnessReport.from_json(tmp_path / "r.json")


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
    options = {"times": ["1s", "1d"], "seeds": 2, "progress": False, "resume": log, "key": "logits"}
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(tiny_bert, evaluate, **options)
    log.write_text(log.read_text() + '{"of": "cut o')
    resumed = evaluate_robustness(tiny_bert, evaluate, **options)
    assert len(calls) == 4 + 3
    again = evaluate_robustness(tiny_bert, evaluate, **{**options, "resume": None})
    assert resumed.to_dict() == again.to_dict()  # read noise too is that of the chip, whatever ran before
    with torch.no_grad():
        tiny_bert.classifier.weight.mul_(0.9)
    with pytest.raises(ValueError, match=r"other weights.*\(what differs: 'weights'\)"):
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
    for key, what in (
        ({"data": "B", "split": 1}, "'data'"),
        (None, "'evaluation', 'evaluation.torch', 'data', 'split'"),
        ("B", "'key', 'data', 'split'"),
    ):
        with pytest.raises(ValueError, match=rf"another evaluation \(what differs: {what}\)"):
            evaluate_robustness(model, mean_square, key=key, **options)
    log = tmp_path / "log.jsonl"  # as earlier versions wrote it
    log.write_text(re.sub(r', "parts": \{[^}]*\}', "", log.read_text()))
    assert evaluate_robustness(model, mean_square, key={"split": 1, "data": "A"}, **options) == first
    with pytest.raises(ValueError, match=r"another evaluation \(an earlier hf_reram's, or nothing tells which\)"):
        evaluate_robustness(model, mean_square, **options)
    with pytest.raises(ValueError, match="allowed is a JSON value"):
        evaluate_robustness(model, mean_square, key=object(), **options)


def test_runs_of_another_config_of_the_model_are_not_taken_over(tiny_bert, tmp_path):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    options = {"times": ["1d"], "seeds": 1, "progress": False, "resume": tmp_path / "log.jsonl"}

    def loss(model):
        return float(model(**bert_batch()).loss.detach())

    evaluate_robustness(tiny_bert, loss, key="loss", **options)
    evaluate_robustness(tiny_bert, lambda m: pytest.fail("not again"), key="loss", **options)
    tiny_bert.config.id2label = {0: "c", 1: "b", 2: "a"}
    with pytest.raises(ValueError, match="another config"):
        evaluate_robustness(tiny_bert, loss, key="loss", **options)


def test_an_evaluation_without_a_key_is_told_by_its_function(model, tmp_path):
    options = {"times": ["1d"], "seeds": 2, "progress": False, "resume": tmp_path / "log.jsonl"}

    def scaled(by):
        return lambda model: {"power": by * mean_square(model)["power"]}

    first = evaluate_robustness(model, scaled(1), **options)
    lines = options["resume"].read_text()
    assert evaluate_robustness(model, scaled(1), **options) == first and options["resume"].read_text() == lines
    with pytest.raises(ValueError, match=r"another evaluation \(what differs: 'evaluation', 'evaluation.by'\)"):
        evaluate_robustness(model, scaled(2), **options)
    other = evaluate_robustness(model, scaled(2), **{**options, "resume": tmp_path / "other.jsonl"})
    for one, twice in zip(first.measurements, other.measurements):
        assert twice.metrics["power"] == pytest.approx(2 * one.metrics["power"])
    lock = threading.Lock()
    with pytest.raises(ValueError, match="the evaluation cannot be told from another one: say with key="):
        evaluate_robustness(model, lambda m: {"locked": lock.locked()}, **options)


def test_a_file_that_an_evaluation_names_counts(model, tmp_path):
    """An error names it; folders with the log itself are names alone."""
    file, folder = tmp_path / "scale.txt", str(tmp_path / "out")
    options = {"times": ["1d"], "seeds": 1, "progress": False, "resume": tmp_path / "out" / "log.jsonl"}

    def evaluate(model):
        open(f"{folder}/last.txt", "a").close()
        return float(file.read_text()) * mean_square(model)["power"]

    (tmp_path / "out").mkdir()
    file.write_text("1")
    first = evaluate_robustness(model, evaluate, **options)
    assert evaluate_robustness(model, evaluate, **options) == first
    file.write_text("2")
    named = rf"'evaluation', 'evaluation\.file', 'evaluation\.file {re.escape(str(file))}'"
    with pytest.raises(ValueError, match=rf'what differs: {named}\).* a file that it writes, say with key="\.\.\."'):
        evaluate_robustness(model, evaluate, **options)
    again = evaluate_robustness(model, evaluate, **{**options, "resume": tmp_path / "other.jsonl"})
    assert again.digital["metric"] == 2 * first.digital["metric"]


class Right:
    """Percent of labels that a model finds, by a method."""

    def __init__(self, batches, way):
        self.batches, self.way, self.limit, self.data = batches, way, 0, {"rows": batches}

    def __call__(self, model):
        return getattr(self, self.way)(model)

    def found(self, model, batches):
        with torch.no_grad():
            return 100 * float(torch.cat([model(x).argmax(-1) == y for x, y in batches]).float().mean())

    def set_anew(self, model):
        self.batches = [(x.to("cpu"), y.to("cpu")) for x, y in self.batches]
        return self.found(model, self.batches)

    def indexed(self, model):
        self.data["rows"] = [row for row in self.data["rows"] if row]
        return self.found(model, self.data["rows"])


class Above:
    def __init__(self, batches, limit):
        self.batches, self.limit = batches, limit

    def __call__(self, model):
        self.limit = float(self.limit)
        return sum(float((model(x).detach() > self.limit).sum()) for x, _ in self.batches)


def in_place(batches):
    def evaluate(model):
        for at, (x, y) in enumerate(batches):
            batches[at] = x.to("cpu"), y.to("cpu")
        return Right(batches, "").found(model, batches)

    return evaluate


def nonlocal_(batches):
    def evaluate(model):
        nonlocal batches
        batches = [(x.to("cpu"), y.to("cpu")) for x, y in batches]
        return Right(batches, "").found(model, batches)

    return evaluate


def with_default(batches):
    (batch,) = ({"x": x, "y": y} for x, y in batches)

    def evaluate(model):
        assert batch.setdefault("mask", None) is None
        return Right(batches, "").found(model, [(batch["x"], batch["y"])])

    return evaluate


WAYS = {
    "self.batches = [b.to(..) for b in self.batches]": lambda batches: Right(batches, "set_anew"),
    "batches[i] = b.to(..)": in_place,
    "nonlocal batches": nonlocal_,
    "batch.setdefault(..)": with_default,
    "self.limit = float(self.limit)": lambda batches: Above(batches[:1], float(batches[0][1][0])),
    "self.data['rows'] = ..": lambda batches: Right(batches, "indexed"),
}


@pytest.mark.parametrize("way", WAYS)
def test_figures_are_never_those_of_other_data_that_an_evaluation_sets_anew(model, tmp_path, way):
    """The second set's labels are none of the first's."""
    x = torch.randn(64, 8)
    labels = model(x).argmax(-1).detach()
    one, other = (WAYS[way]([(x, (labels + shift) % 3)]) for shift in (0, 1))
    options = {"times": ["1d"], "seeds": 1, "progress": False}
    log = tmp_path / "log.jsonl"
    first = evaluate_robustness(model, one, resume=log, **options)
    with pytest.raises(ValueError, match=r'another evaluation \(what differs: .*say with key="\.\.\."'):
        evaluate_robustness(model, other, resume=log, **options)
    second = evaluate_robustness(model, other, **options)
    assert second.digital != first.digital and second.measurements != first.measurements


COUNTING = """
import os
import sys
import torch
from torch import nn
from hf_reram import ReRAMConfig, calibrate, evaluate_robustness, patch_model

torch.manual_seed(0)
model = calibrate(patch_model(nn.Sequential(nn.Linear(8, 4)).eval(), ReRAMConfig()), [torch.ones(3, 8)])
seen, words = [], {"a", "b", "c"}

def evaluate(model):
    seen.append(float(model(torch.ones(3, 8)).detach().sum()))
    if len(seen) == int(os.environ["FAILS"]):  # of the command line it would be told
        raise KeyboardInterrupt
    return {"sum": seen[-1], "words": len(words)}

def run():
    return evaluate_robustness(model, evaluate, ["1d"], seeds=4, progress=False, resume=sys.argv[1])

try:
    report = run()
except KeyboardInterrupt:
    try:
        run()
    except ValueError as error:
        print(len(seen), error)
else:
    print(len(seen), report.to_json())
"""


def test_an_evaluation_that_changes_itself_is_resumed_in_a_new_process(python, tmp_path):
    """And in the same one an error names what it has changed, and the way out."""

    def run(log, fails):
        done = python.run("-c", COUNTING, str(tmp_path / log), FAILS=str(fails))
        assert done.returncode == 0, done.stderr
        count, _, text = done.stdout.partition(" ")
        return int(count), text

    count, text = run("killed", 4)
    assert count == 4 and "what differs: 'evaluation', 'evaluation.seen')" in text and 'say with key="..."' in text
    (whole, report), (rest, resumed) = run("whole", 0), run("killed", 0)
    assert (whole, rest) == (6, 3) and json.loads(resumed) == json.loads(report)


def test_runs_of_other_versions_are_run_again(model, tmp_path, caplog, monkeypatch):
    """And stay where they are, for when these versions are back."""
    log = tmp_path / "log.jsonl"
    options = {"times": ["1d"], "seeds": 2, "progress": False, "resume": log, "key": "counted"}
    calls = []

    def counted(model):
        calls.append(1)
        return {"calls": float(len(calls))}

    def found():
        with caplog.at_level("WARNING", "hf_reram"):
            report = evaluate_robustness(model, counted, allow_uncalled=True, **options)
        return [report.digital["calls"], report.ideal["calls"], *(m.metrics["calls"] for m in report.measurements)]

    assert found() == found() == [1.0, 2.0, 3.0, 4.0] and "run again" not in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        assert found() == found() == [5.0, 6.0, 7.0, 8.0]
    assert f"{log} holds 4 runs of torch {torch.__version__}: they are run again" in caplog.text
    assert found() == [1.0, 2.0, 3.0, 4.0] and "holds 4 runs of torch 0.1: they are run again" in caplog.text
    with monkeypatch.context() as patch:  # which says what tells the model in other words, too
        patch.setattr("platform.python_version_tuple", lambda: ("3", "1", "4"))
        patch.setattr(model, "said", "by a config of another transformers", raising=False)
        assert found() == found() == [9.0, 10.0, 11.0, 12.0]
    assert found() == [1.0, 2.0, 3.0, 4.0] and "holds 8 runs of python 3.1: they are run again" in caplog.text
    log.write_text(re.sub(r', "versions": .*?}', "", log.read_text()))  # as earlier versions wrote it
    assert found() == [13.0, 14.0, 15.0, 16.0]


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
    assert told in report.notes and told in caplog.text and " loss is nan on chip 1 after 1d." in report.to_markdown()
    report.to_json(tmp_path / "r.json")
    assert "NaN" not in (tmp_path / "r.json").read_text()
    again = RobustnessReport.from_json(tmp_path / "r.json")
    assert math.isnan(again.measurements[1].metrics["loss"]) and again.statistic("loss", "1d").mean == 4.0
    report.plot(tmp_path / "r.png", metric="loss")
    assert "Mean ± standard deviation over 3 chips; over 2: loss after 1d." in report.to_markdown()


def test_what_is_infinite_stays_so_in_a_file(tmp_path):
    values = (math.inf, -math.inf, math.nan, 1.0)
    report = RobustnessReport([Measurement(1.0, None, i, {"x": v}) for i, v in enumerate(values)], {"x": math.inf})
    text = report.to_json(tmp_path / "r.json")
    assert "Infinity" not in text and "NaN" not in text
    again = RobustnessReport.from_json(tmp_path / "r.json")
    assert [str(m.metrics["x"]) for m in again.measurements] == ["inf", "-inf", "nan", "1.0"]
    assert again.digital == {"x": math.inf} and again.left_out() == report.left_out()


def test_a_metric_that_some_chips_lack_is_counted_and_named(model):
    runs = []

    def evaluate(model):
        runs.append(mean_square(model))
        run = len(runs)  # the references, then chips 0 to 3
        return {"a": float(run), **({"b": 10.0 * run} if run > 3 else {}), **({"c": 1.0} if run == 6 else {})}

    report = evaluate_robustness(model, evaluate, ["1d"], seeds=4, progress=False)
    assert report.metrics == ["a", "b", "c"]
    assert report.statistic("b", "1d").mean == 50.0 and report.statistic("b", "1d").chips == 3
    table = report.to_markdown()
    assert "Mean ± standard deviation over 4 chips; over 3: b after 1d; over 1: c after 1d." in table
    assert " b is missing on chip 0 after 1d." in table
    assert "b is missing on chip 0 after 1d" in report.notes and "c is missing on chip 3 after 1d" not in report.notes
    assert "| c | – | – | 1.000 |" in table


def test_a_row_of_the_table_is_of_its_own_temperature(model):
    """The reference's chips are not those of the temperature that was evaluated first."""

    def evaluate(model):
        with torch.no_grad():
            return {"error": float((model(torch.ones(3, 8)) - 1).square().mean())}

    for order in (["150C", None], [None, "150C"]):
        report = evaluate_robustness(model, evaluate, ["1h"], order, seeds=4, progress=False)
        means = {
            kelvin: np.mean([m.metrics["error"] for m in report.measurements if m.temperature == kelvin])
            for kelvin in (None, 423.15)
        }
        assert abs(means[None] - means[423.15]) > 1e-3
        listed = {row["temperature"]: row["mean"] for row in report.to_dict()["statistics"]}
        assert listed == pytest.approx(means)
        assert report.statistic("error", "1h").mean == pytest.approx(means[None])
        assert report.statistic("error", "1h", "150C").mean == pytest.approx(means[423.15])
        rows = report.to_markdown(6).splitlines()
        assert next(row for row in rows if "reference" in row).split(" ± ")[0].endswith(f"{means[None]:.6f}")
        assert next(row for row in rows if "423.15 K" in row).split(" ± ")[0].endswith(f"{means[423.15]:.6f}")
    alone = RobustnessReport([m for m in report.measurements if m.temperature == 423.15])
    assert alone.statistic("error", "1h").mean == pytest.approx(means[423.15])
    assert "over 4 chips at 423.15 K." in alone.to_markdown()
    with pytest.raises(ValueError, match="nothing measured"):
        alone.statistic("error", "1h", 300)


def test_a_chip_counts_once(model, tmp_path):
    options = {"seeds": 3, "progress": False, "references": False}
    for times, kelvins in ((["1d", "24h"], [None, None]), (np.array([86400, 86400]), [300, "300K", np.float32(300)])):
        report = evaluate_robustness(model, mean_square, times, kelvins, **options)
        assert len(report.measurements) == report.statistic("power", "1d").chips == 3
    with pytest.raises(ValueError, match=r"seeds=\[3, 4, 3\] names a chip twice"):
        evaluate_robustness(model, mean_square, ["1d"], seeds=[3, 4, 3], progress=False)
    data = report.to_dict()
    data["measurements"] += data["measurements"][:1]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r\.json is no .* report: chip 0 was measured 2 times after 1d at 300 K"):
        RobustnessReport.from_json(tmp_path / "r.json")


def test_one_chip_has_no_spread(model, tmp_path):
    report = evaluate_robustness(model, mean_square, ["1d"], seeds=1, progress=False)
    found = report.statistic("power", "1d")
    assert found.chips == 1 and math.isnan(found.std) and math.isnan(found.ci95)
    assert report.to_dict()["statistics"][0]["std"] is report.to_dict()["statistics"][0]["ci95"] is None
    assert "±" not in report.to_markdown()
    assert "Of a single chip, so that there is no spread." in report.to_markdown()
    report.plot(tmp_path / "r.png")
    assert "| one | 2.0 | 2.0 |" in comparison_table({"one": report}, "constant")
    assert over_chips({"power": found}) == "of a single chip, so that there is no spread"


def test_models_in_one_table_are_each_at_their_own_times_and_temperature():
    def report(times, kelvin, value):
        return RobustnessReport([Measurement(t, kelvin, s, {"f1": value + s}) for t in times for s in range(2)])

    reports = {"a": report((1.0, 86400.0), None, 50.0), "b": report((86400.0,), 400.0, 20.0)}
    table = comparison_table(reports)
    assert "| a | – | 50.5 ± 0.7 | 50.5 ± 0.7 |" in table
    assert "| b at 400 K | – | – | 20.5 ± 0.7 |" in table
    assert "| f1 | 50.5 | 20.5 |" in metrics_table(reports, 86400.0)
    assert "| f1 | 50.5 | – |" in metrics_table(reports, 1.0)


def test_temperatures_may_be_texts(model):
    report = evaluate_robustness(model, mean_square, ["1d"], ["85C", 300], seeds=1, progress=False)
    assert report.temperatures == [358.15, 300.0]
    with pytest.raises(ValueError, match=r"temperature=85: allowed is 200 to 2000 K.*; 85 °C\? write '85C'"):
        evaluate_robustness(model, mean_square, ["1d"], [85], seeds=1, progress=False)


def test_a_temperature_that_a_deployment_takes_by_itself_counts_once():
    """Which is the config's, or the device's reference."""
    for configured, given, noted in (
        (None, [None, 298.15, "25C"], [None]),
        ("85C", [None, 358.15], [358.15]),
        ("85C", [298.15, None], [298.15, 358.15]),
        (298.15, [298.15], [None]),
    ):
        torch.manual_seed(0)
        made = patch_model(nn.Sequential(nn.Linear(8, 4)).eval(), ReRAMConfig(temperature=configured))
        calibrate(made, [torch.randn(32, 8)])
        report = evaluate_robustness(made, mean_square, ["1h"], given, 2, progress=False)
        assert report.temperatures == noted and len(report.measurements) == 2 * len(noted)
        own = [m.metrics for m in report.measurements if m.temperature == noted[-1]]
        assert own == [
            m.metrics for m in evaluate_robustness(made, mean_square, ["1h"], seeds=2, progress=False).measurements
        ]
        assert report.statistic("power", "1h", made[0].crossbar.config.kelvin).mean == np.mean(
            [m["power"] for m in own]
        )
