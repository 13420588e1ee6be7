"""Several processes train as one, also where each calls other layers, and stop together."""

import pytest
import torch

from tests.training.following_script import FSDP2
from tests.training.routed_script import PROCESSES, STEPS

SCRIPT = "tests.training.routed_script"


def loaded(out, *ranks):
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("kind", ["output+drift", "weight", "sensitivity+drift"])
def test_retention_terms_are_reduced_by_layer(python, tmp_path, kind):
    files = {mode: str(tmp_path / mode) for mode in ("one", "ddp", "fsdp")}
    (one,) = loaded(files["one"], python.run("-m", SCRIPT, files["one"], "one", kind))
    assert len({found["retention"] for found in one}) == STEPS
    for mode in ("ddp", "fsdp"):
        two = loaded(files[mode], *python.run_two("-m", SCRIPT, files[mode], mode, kind))
        assert len(two) == PROCESSES
        for found, alone in ((rank[step], one[step]) for rank in two for step in range(STEPS)):
            assert found["retention"] == pytest.approx(alone["retention"], rel=1e-5)
            for part in ("grads", "state"):
                assert found[part].keys() == alone[part].keys()
                for name, value in alone[part].items():
                    where = f"{mode}, {name}"
                    torch.testing.assert_close(
                        found[part][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, w=where: f"{w}: {m}"
                    )


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("part", ["loss", "term"])
def test_a_nan_in_one_process_stops_all(python, tmp_path, environment, part):
    ranks = python.run_two("-m", "tests.training.nan_script", str(tmp_path), part, **environment)
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    start = f"sharded {bool(environment)}, after 1: the loss of step 2 is "
    assert ranks[0].stdout.strip() == start + ("not finite in another process" if part == "loss" else "nan")
    assert ranks[1].stdout.strip() == start + "nan"


def test_frozen_batch_norm_stays_on_two_processes_too(python, tmp_path):
    script, files = "tests.training.batch_norm_script", [str(tmp_path / name) for name in ("one", "two")]
    (one,) = loaded(files[0], python.run("-m", script, files[0]))
    for rank in loaded(files[1], *python.run_two("-m", script, files[1])):
        for name, value in rank["after"].items():
            torch.testing.assert_close(value, one["after"][name], rtol=1e-4, atol=1e-6)
            if "running" in name or "tracked" in name:
                assert torch.equal(value, rank["before"][name]), name
        for name in ("first.weight", "norm.weight", "last.weight"):
            assert not torch.equal(rank["after"][name], rank["before"][name]), name


@pytest.mark.parametrize(("loss", "way"), [("drift", "skipped"), ("output", "skipped"), ("output", "frozen")])
def test_a_process_without_crossbars_takes_part_in_the_log(python, tmp_path, loss, way):
    """Means are over the processes that have something to say; and nothing is followed where all is frozen."""
    out = str(tmp_path / "logs")
    ranks = loaded(out, *python.run_two("-m", "tests.training.uncalled_script", out, loss, way))
    for step in range(2):
        one, two = (rank[step] for rank in ranks)
        for name in ("task_loss", "retention_loss", "noise_to_signal"):
            assert one[name] == two[name] > 0
        total = one["task_loss"] + (0.3 * one["retention_loss"] if loss == "output" else 0)
        assert one["loss"] == pytest.approx(total, rel=1e-3)
        same = 0.1 if way == "frozen" and loss == "output" else 1e-4  # a ratio of means, a mean of ratios
        assert one["retention_loss"] == pytest.approx(one["noise_to_signal"], rel=same)
