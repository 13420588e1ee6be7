"""Numbers that follow the training are those of one process, in all of several, and resume where they were."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.training.following_script import FSDP2

SCRIPT = "tests.training.following_script"


def loaded(out, *ranks):
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def one(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return loaded(folder / "found.pt", python.run("-m", SCRIPT, str(folder / "found.pt"), str(folder)))[0]


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_two_processes_follow_as_one(python, tmp_path, one, environment):
    out, resumed = str(tmp_path / "found.pt"), str(tmp_path / "resumed.pt")
    two = loaded(out, *python.run_two("-m", SCRIPT, out, str(tmp_path), **environment))
    for rank in two:
        assert rank["sharded"] == bool(environment)
        assert equal(rank["numbers"], two[0]["numbers"]) and equal(rank["weights"], two[0]["weights"])
        for step, numbers in one["numbers"].items():
            close(rank["numbers"][step], numbers, step)
        close(rank["weights"], one["weights"])
    numbers = two[0]["numbers"]
    moved = [name for name, value in numbers[9].items() if not torch.equal(value, numbers[1][name])]
    kinds = {name.rpartition(".")[2] for name in moved}
    assert kinds == {"input_range", "gain", "adc_range", "weight_scale", "input_floor", "input_offset"}
    assert equal(numbers[10], numbers[9])  # settled in the last tenth
    for checkpoint in ("checkpoint-5", "checkpoint-10"):
        state = AutoModelForSequenceClassification.from_pretrained(tmp_path / checkpoint).state_dict()
        for name, value in numbers[int(checkpoint.partition("-")[2])].items():
            assert torch.equal(state[name], value), f"{checkpoint}: {name}"
    arguments = (resumed, str(tmp_path / "again"), str(tmp_path / "checkpoint-5"))
    again = loaded(resumed, *python.run_two("-m", SCRIPT, *arguments, **environment))
    for rank in again:
        assert list(rank["numbers"]) == [6, 7, 8, 9, 10]
        for step, found in rank["numbers"].items():
            assert equal(found, numbers[step]), step
        assert equal(rank["weights"], two[0]["weights"])


@pytest.mark.slow
def test_learned_ranges_that_are_sharded_follow_as_those_of_one_process(python, tmp_path):
    out = str(tmp_path / "one.pt"), str(tmp_path / "two.pt")
    one = loaded(out[0], python.run("-m", SCRIPT, out[0], str(tmp_path / "a"), INPUT_RANGE="learned"))[0]
    two = loaded(out[1], *python.run_two("-m", SCRIPT, out[1], str(tmp_path / "b"), INPUT_RANGE="learned", **FSDP2))
    assert [rank["sharded"] for rank in two] == [True, True]
    names = [name for name in one["weights"] if name.endswith("input_range")]
    assert len(names) == 14
    for rank in two:
        close(rank["weights"], one["weights"])


def equal(a: dict, b: dict) -> bool:
    """Nested, to the last bit."""
    return a.keys() == b.keys() and all(
        equal(a[key], b[key]) if isinstance(a[key], dict) else torch.equal(a[key], b[key]) for key in a
    )


def close(found: dict, expected: dict, step: int | str = "end") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"step {step}, {n}: {m}"
        )
