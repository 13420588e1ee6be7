"""Weights that FSDP2 has sharded over two processes: the numbers of one process, and decisions alike."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_reram import report_of
from tests.evaluation.sharded_script import CALIBRATED
from tests.training.following_script import FSDP2

SCRIPT = "tests.evaluation.sharded_script"


@pytest.fixture
def both(python, tmp_path):
    """What one process finds, and each of two."""

    def run(case, alone=True):
        files = tmp_path / "one.pt", tmp_path / "two.pt"
        done = [python.run("-m", SCRIPT, case, str(files[0]))] if alone else []
        done += python.run_two("-m", SCRIPT, case, str(files[1]))
        for rank in done:
            assert rank.returncode == 0, rank.stderr[-3000:]
        two = torch.load(files[1], weights_only=False)
        return (torch.load(files[0], weights_only=False)[0], two) if alone else two

    return run


# Numbers that are shown of a layer, by whether there are data.
FIELDS = {"by weights": 11 + 3, "by data": 11 + 4}


@pytest.mark.parametrize("case", CALIBRATED)
def test_calibrate_inspect_and_evaluate_find_what_one_process_finds(both, case):
    one, two = both(case)
    for found in two:
        assert found["digest"] == one["digest"] == found["report"]["weights"] and found["same"]
        assert found["layers"].keys() == one["layers"].keys()
        for name, values in one["layers"].items():
            torch.testing.assert_close(found["layers"][name], values, rtol=1e-5, atol=1e-7)
        assert found["kinds"] == one["kinds"] and len(one["kinds"]) == 14
        for key in ("by weights", "by data"):
            numbers = FIELDS[key] + (key == "by data" and "adc_bits" in CALIBRATED[case])
            assert len(one[key]) == 14 * numbers and found[key] == pytest.approx(one[key], rel=1e-5)
        assert_same_figures(found["report"], one["report"])
        assert found["report"]["notes"] == one["report"]["notes"]
        torch.testing.assert_close(found["chip"], one["chip"])
        assert torch.equal(found["read back"], found["chip"])
        assert found["conductances"] == one["conductances"]
    aged = [m["metrics"]["loss"] for m in one["report"]["measurements"]]
    assert len(set(aged)) == 4


def test_a_sharded_and_frozen_model_is_patched(both):
    one, two = both("patched")
    for found in two:
        assert found["digest"] == one["digest"]
        for name, value in one["sensitivity"].items():
            assert bool(value.any()), name
            torch.testing.assert_close(found["sensitivity"][name], value, rtol=1e-4, atol=1e-8)


def test_a_chip_of_sharded_weights_in_mixed_precision(both):
    one, two = both("bfloat16")
    for found in two:
        torch.testing.assert_close(found["chip"], one["chip"], rtol=0.05, atol=0.01)


def test_processes_decide_alike(both):
    two = both("alike", alone=False)
    first, second = two
    assert first["report"] == second["report"] and len(first["report"]["measurements"]) == 6
    assert first["runs"] == 8  # each once
    for found in two:
        assert_same_figures(found["resumed"], first["report"])
        assert found["evaluations"] == 2
        assert not any(math.isnan(m["metrics"]["loss"]) for m in found["nan in another"]["measurements"])
        assert any("different figures" in note for note in found["nan in another"]["notes"])
        assert_same_figures(found["shared"], first["report"], chips=2)
        assert found["report"]["weights"] == found["DDP"]["weights"]
        assert_same_figures(found["DDP"], first["report"])
        assert_same_figures(found["divided"], first["report"])
        assert found["keyed"][0] == found["keyed"][1] == first["keyed"][0]
        assert_same_figures(found["keyed"][0], first["report"], chips=2)
        assert found["keyed evaluations"] == 3  # of 4 chips and 2 references, once
        assert "1 layers changed while the model was deployed" in found["changed"]
        told = "NaN or infinite values are in bert.encoder.layer.0.attention.self.query.weight: allowed are finite"
        assert found["not finite"] == [f"{told} numbers"] * 3
    assert first["failed"] == "the evaluation failed in process 1: ValueError: no figures here"
    assert second["failed"] == "no figures here"
    assert (first["failed apart"], second["failed apart"]) == (first["failed"], second["failed"])


def test_the_trainer_evaluates_alone_under_ddp_and_under_fsdp2(python, tmp_path):
    found, runs = {}, []
    for name, environment in (("one", {}), ("ddp", {}), ("fsdp2", FSDP2)):
        out, folder = tmp_path / f"{name}.pt", tmp_path / name
        command = ("-m", "tests.evaluation.trainer_script", str(out), str(folder))
        done = [python.run(*command)] if name == "one" else python.run_two(*command, **environment)
        for rank in done:
            assert rank.returncode == 0, rank.stderr[-3000:]
        found[name] = torch.load(out, weights_only=False)
        runs.append(len((folder / "chips.jsonl").read_text().split("\n\n")))
        saved = json.loads((folder / "robustness.json").read_text())
        assert saved["measurements"] == json.loads(json.dumps(found[name][0]["report"]["measurements"]))
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert report_of(model).weights == saved["weights"]
        assert "1d" in (folder / "README.md").read_text()
    assert runs[0] == runs[1] == runs[2]
    alone = found["one"][0]
    assert "refused" not in alone
    for name in ("ddp", "fsdp2"):
        for rank in found[name]:
            assert rank["sharded"] == (name == "fsdp2")
            assert "share_chips=True: allowed is False with 2 processes" in rank["refused"]
            assert rank["report"]["weights"] == alone["report"]["weights"]
            assert rank["report"] == found[name][0]["report"] and rank["report"]["notes"] == alone["report"]["notes"]
            assert_same_figures(rank["report"], alone["report"])


def assert_same_figures(found, expected, chips=None):
    """Of the first so many chips."""
    wanted = [m for m in expected["measurements"] if chips is None or m["seed"] < chips]
    assert [(m["time"], m["seed"]) for m in found["measurements"]] == [(m["time"], m["seed"]) for m in wanted]
    for mine, theirs in zip(found["measurements"], wanted):
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
    for reference in ("digital", "ideal"):
        assert found[reference] == pytest.approx(expected[reference], rel=1e-5)
