"""What is on disk, and what a resumption makes of it, after a kill or with a full disk; losses that are not finite."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from hf_reram import ReRAMConfig, ReRAMTrainer
from hf_reram.training.checkpoints import MARK, STAGING, last_checkpoint, set_incomplete_aside, staged
from tests.samples.models import bert_batch


@pytest.fixture(scope="module")
def train(python) -> Callable[..., subprocess.CompletedProcess]:
    return lambda out, *fault: python.run("-m", "tests.training.fault_script", str(out), *fault)


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory) -> list[float]:
    return json.loads(train(tmp_path_factory.mktemp("whole")).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "fault",
    [
        "kill in training",
        "kill while the model is saved",
        "kill while the optimizer is saved",
        "kill while the state is saved",
        "disk full",
    ],
)
def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(train, tmp_path, fault, uninterrupted):
    done = train(tmp_path, fault)
    if fault == "disk full":
        assert done.returncode == 1 and "File too large" in done.stderr
    else:
        assert done.returncode == -9
    step = 4 if fault == "kill in training" else 2
    checkpoint = Path(last_checkpoint(tmp_path))
    assert checkpoint.name == f"checkpoint-{step}"
    assert all(torch.isfinite(t).all() for t in load_file(checkpoint / "model.safetensors").values())
    again = train(tmp_path)
    assert len(uninterrupted) == 6 and json.loads(again.stdout.splitlines()[-1]) == uninterrupted
    aside = [] if fault == "kill in training" else ["incomplete-checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", *aside]
    assert not (tmp_path / "checkpoint-6" / ".incomplete").exists()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "weights").write_text("old")
    (tmp_path / "README.md").write_text("a person's")
    with pytest.raises(OSError, match="full"), staged(tmp_path) as staging:
        (Path(staging) / "weights").write_text("ne")
        raise OSError("disk full")
    assert (tmp_path / "weights").read_text() == "old"
    with staged(tmp_path) as staging:
        for name in ("weights", "README.md", "part/of"):
            (Path(staging) / name).parent.mkdir(exist_ok=True)
            (Path(staging) / name).write_text("new")
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"weights": "new", "README.md": "a person's", "part/of": "new"}


def test_a_persons_folder_of_the_stagings_name_stays(tmp_path):
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "mine").write_text("a person's")
    for _ in range(2):
        with pytest.raises(OSError, match="full"), staged(tmp_path) as staging:
            raise OSError("disk full")
        with staged(tmp_path) as staging:
            (Path(staging) / "weights").write_text("new")
    (tmp_path / f"{STAGING}-1").mkdir()  # of a process that was killed
    for name in (MARK, "weights"):
        (tmp_path / f"{STAGING}-1" / name).write_text("old")
    with staged(tmp_path) as staging:
        assert os.listdir(staging) == [MARK]
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {f"{STAGING}/mine": "a person's", "weights": "new"}


def test_only_what_carries_our_mark_is_set_aside_and_nothing_is_deleted(tmp_path):
    files = {
        "checkpoint-5": {"trainer_state.json": '{"global_step": 5}', "model.safetensors": "weights"},
        "checkpoint-10": {"trainer_state.json": '{"global', MARK: "", "model.safetensors": "weights"},
        "checkpoint-15": {"trainer_state.json": '{"global_step": 15, "of_another_transformers": 1}'},
        "checkpoint-20": {"__0_0.distcp": "shards"},
        "checkpoint-25": {"mp_rank_00_model_states.pt": "DeepSpeed"},
        "incomplete-checkpoint-10": {"model.safetensors": "older"},
        "other": {MARK: ""},
    }
    for folder, contents in files.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            (tmp_path / folder / name).write_text(text)
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-15"
    for _ in range(2):
        set_incomplete_aside(tmp_path)
        found = {path.name: {f.name: f.read_text() for f in path.iterdir()} for path in tmp_path.iterdir()}
        assert found == {"incomplete-checkpoint-10-1" if n == "checkpoint-10" else n: c for n, c in files.items()}
    assert last_checkpoint(tmp_path / "nowhere") is None


class _Spoils(nn.Module):
    def forward(self, x):
        return x * float("nan") if self.training else x


def spoil_weight(model):
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    return r"'classifier.weight' of the model holds NaN"


def spoil_activation(model):
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = _Spoils()
    return r"step 1 is nan: layer 'bert.encoder.layer.1.intermediate.intermediate_act_fn' \(_Spoils\) makes NaN"


def spoil_crossbar(model):
    model.bert.encoder.layer[0].output.dense.register_buffer("gain", torch.tensor([float("nan")]), persistent=False)
    return r"layer 'bert.encoder.layer.0.output.dense' \(CrossbarLinear\) makes NaN or infinite values of inputs of"


def infinite(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() * float("inf")


@pytest.mark.parametrize(
    ("spoil", "loss"), [(spoil_weight, None), (spoil_activation, None), (spoil_crossbar, None), (None, infinite)]
)
def test_a_loss_that_is_not_finite_names_the_layer(tiny_bert, tmp_path, spoil, loss):
    batch = bert_batch()
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    args = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    config = ReRAMConfig(retention_loss="output")
    trainer = ReRAMTrainer(tiny_bert, args, train_dataset=data, reram_config=config, compute_loss_func=loss)
    message = spoil(tiny_bert) if spoil else "step 1 is inf: all layers give finite values: it is the loss function"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
