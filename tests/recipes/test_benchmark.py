"""recipes/benchmark.py at a tiny size: what it prints and writes, not how fast anything is."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmark.py"


@pytest.fixture
def run(python) -> Callable[..., subprocess.CompletedProcess]:
    return partial(python.run, str(SCRIPT))


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    BertConfig(
        vocab_size=2000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(shape, tmp_path) -> list[str]:
    flags = ["--model_name_or_path", shape, "--batch_size", "2", "--length", "8", "--pairs", "1"]
    return [*flags, "--output", str(tmp_path / "found.json")]


def test_every_part_reports_ratios(run, tiny, tmp_path):
    variants = ["drift (default)", "chip", "LoRA: drift", "consistency", "8-bit DAC and ADC"]
    done = run(*tiny, "--parts", "training", "inference", "chip", "--memory", "False", "--variants", *variants)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    training = {row["variant"]: row for row in found["training"]}
    losses = {"retention loss: drift (default)", "retention loss: consistency"}
    assert training.keys() == losses | {"LoRA: drift", "8-bit DAC and ADC"}  # a whole name means that one
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert all(row["time"] > 0 and row["digital_seconds"] > 0 for row in training.values())
    assert [row["variant"] for row in found["inference"]] == ["8-bit DAC and ADC", "chip"]
    assert found["chip"]["chip_seconds"] > 0
    assert f"| LoRA: drift | {training['LoRA: drift']['time']:.2f} | – |" in done.stdout


@pytest.mark.slow  # three processes
def test_memory_is_that_of_training(run, tiny, tmp_path):
    done = run(*tiny, "--parts", "training", "inference", "--variants", "output+drift", "chip")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["training"]
    assert row["memory"] > 0 and f"| {row['variant']} | {row['time']:.2f} | {row['memory']:.2f} |" in done.stdout
    assert [row["memory"] for row in found["inference"]] == [None]


def test_language_models(run, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaConfig(vocab_size=100, tie_word_embeddings=True, **shape).save_pretrained(tmp_path)
    flags = ["--model", "smollm2", "--model_name_or_path", str(tmp_path), "--batch_size", "2", "--length", "8"]
    flags += ["--pairs", "1", "--memory", "False", "--parts", "training", "size", "--variants", "bfloat16:"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    parameters = 100 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16  # embeddings, attention, MLP, norms
    assert f"\n{parameters:,} parameters: patch seconds" in done.stdout
    assert found["size"].keys() == {"patch_seconds", "calibrate_seconds", "chip_seconds", "peak_gib"}
    assert all(value > 0 for value in found["size"].values())
    rows = found["training"]
    names = ["bfloat16: digital", "bfloat16: drift", "bfloat16: drift, 8-bit DAC and ADC"]
    assert [row["variant"] for row in rows] == names
    assert all(row["time"] > 0 for row in rows)


def test_what_cannot_be_run_is_skipped_with_the_reason(run):
    flags = ["--model", "mobilenetv3", "--batch_size", "1", "--parts", "inference", "--variants", "aihwkit"]
    done = run(*flags, "--memory", "False")
    assert done.returncode == 0, done.stderr
    assert "| skipped: aihwkit-lightning refuses" in done.stdout or "| skipped: pip install --no-deps" in done.stdout


def test_wrong_flags_are_named(run):
    assert "parts=['nothing']" in run("--parts", "nothing").stderr
    assert "allowed are minilm, smollm2, deit-tiny and mobilenetv3" in run("--model", "gpt").stderr
