import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

import hf_reram
from tests.samples import squad as squad_sample

RECIPE = Path(__file__).parents[2] / "recipes" / "squad.py"
SMALL = ["--max_steps", "3", "--chips", "2", "--times", "1s", "1d", "--save_steps", "2", "--use_cpu", "True"]
SMALL += ["--max_length", "40", "--train_max_length", "40", "--doc_stride", "8", "--per_device_train_batch_size", "4"]


@pytest.fixture
def run(python, tmp_path) -> Callable[..., str]:
    """Runs the recipe on a sample in a folder, and gives what it prints, or its errors where it ``fails``."""

    def run(*flags: str, folder: Path = tmp_path, processes: int = 1, fails: bool = False) -> str:
        files = [part for pair in squad_sample.write(folder).items() for part in pair]
        command = [str(RECIPE), *files, "--output_dir", str(folder / "out"), *SMALL, *flags]
        ranks = [python.run(*command)] if processes == 1 else python.run_two(*command)
        assert all((rank.returncode != 0) == fails for rank in ranks), ranks[0].stderr[-3000:]
        return "".join(rank.stderr if fails else rank.stdout for rank in ranks)

    return run


def test_the_whole_protocol_and_its_resumption(run, tmp_path):
    output = run()
    assert "| hf_reram |" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report) == 5 and "| digital, finetuned | – |" in output
    assert (tmp_path / "out" / "robustness.png").exists()
    ours = tmp_path / "out" / "hf-reram"
    model = AutoModelForQuestionAnswering.from_pretrained(ours / "model")
    assert hf_reram.crossbar_layers(model)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 6
    card = (ours / "model" / "README.md").read_text()
    assert re.search(r"trained on \d+ windows of train\.parquet", card) and "base" in card
    before = (ours / "chips.jsonl").read_text(), (ours / "model" / "model.safetensors").read_bytes()
    # Killed after training and all but one chip: the same figures again, that chip alone measured anew.
    lines = before[0].splitlines(keepends=True)
    (ours / "chips.jsonl").write_text("".join(lines[:-1]))
    run()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (ours / "chips.jsonl").read_text().split() == before[0].split()
    assert (ours / "model" / "model.safetensors").read_bytes() == before[1]
    refused = run("--optim", "sgd", "--gradient_accumulation_steps", "8", fails=True)
    assert "other values of ['settings.gradient_accumulation_steps', 'settings.optim']: allowed are the same" in refused


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--teacher", "True"], id="teacher"),
        pytest.param(["--lora", "True", "--lora_rank", "2"], id="lora"),
        pytest.param(["--fused_kernels", "True", "--adc_bits", "8"], id="fused kernels", marks=pytest.mark.compiler),
    ],
)
def test_without_labels_with_lora_and_with_fused_kernels(run, flags):
    printed = run("--methods", "digital", "hf_reram", *flags)
    assert "| hf_reram |" in printed and ("| digital, finetuned |" in printed) == ("--teacher" not in flags)


def test_two_processes_write_once_and_measure_the_same(run, tmp_path):
    flags = ["--methods", "naive", "calibrated"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    printed = run(*flags, folder=tmp_path / "one"), run(*flags, folder=tmp_path / "two", processes=2)
    assert [out.count("\n| naive crossbar |") for out in printed] == [1, 1]
    one, two = (json.loads((tmp_path / name / "out" / "report.json").read_text()) for name in ("one", "two"))
    for label in one:
        for alone, shared in zip(one[label]["measurements"], two[label]["measurements"], strict=True):
            assert alone.pop("metrics") == pytest.approx(shared.pop("metrics"), rel=1e-4)  # sums may differ in order
            assert alone == shared


def test_the_fsdp2_recipe_runs_to_its_end(python, run, tmp_path):
    """Sharded over two processes: the weights and figures of one process."""
    flags, homes = ["--methods", "digital", "calibrated", "hf_reram"], (tmp_path / "one", tmp_path / "two")
    for home in homes:
        home.mkdir()
        squad_sample.write(home)
        config = home / "base" / "config.json"  # without dropout, whose masks are each process's own
        changed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    flags += ["--per_device_train_batch_size", "2"]
    run(*flags, "--gradient_accumulation_steps", "2", folder=homes[0])
    files = [part for pair in squad_sample.write(homes[1]).items() for part in pair]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/configs/fsdp2.yaml"]
    launch += ["--main_process_port", "0", "-m", "tests.recipes.fsdp_script", str(RECIPE), *files]
    launch += ["--output_dir", str(homes[1] / "out"), *SMALL, *flags]
    done = python.run(*launch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n| hf_reram |") == 1 and "sharded: True" in done.stderr
    one, two = (home / "out" / "hf-reram" for home in homes)
    runs = [line for line in (two / "chips.jsonl").read_text().splitlines() if line]
    assert len(runs) == 6  # each once
    expected, found = (json.loads((home / "robustness.json").read_text()) for home in (one, two))
    for mine, theirs in zip(found["measurements"], expected["measurements"], strict=True):
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3)
    controls = [report["about"]["control_metrics"] for report in (found, expected)]
    assert controls[0] and controls[0] == pytest.approx(controls[1], rel=1e-3)
    models = [AutoModelForQuestionAnswering.from_pretrained(home / "model") for home in (one, two)]
    weights, sharded = (model.state_dict() for model in models)
    assert weights.keys() == sharded.keys()
    for name, value in weights.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert hf_reram.report_of(models[1]).weights == found["weights"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "nowhere.parquet"], "no such path nowhere.parquet"),
        (["--device", "unobtainium"], "unobtainium"),
        (["--train_file", str(RECIPE)], "allowed are .parquet"),
    ],
)
def test_bad_input_is_a_clear_error(run, flags, message):
    assert message in run(*flags, fails=True)


def test_a_model_for_something_else_is_refused(run, tmp_path):
    squad_sample.write(tmp_path)
    squad_sample.model(40).bert.save_pretrained(tmp_path / "base")
    assert "is no question answering model" in run(fails=True)
