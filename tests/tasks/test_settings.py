"""Which flags a comparison may be resumed with."""

import json
from dataclasses import dataclass

import pytest

from hf_reram.tasks import RecipeTrainingArguments, ReRAMArguments
from hf_reram.tasks.settings import NEUTRAL, NEUTRAL_KINDS, recipe_settings


@dataclass
class Arguments:
    train_file: str = "a.parquet"
    lora: bool = False


def settings(reram: dict | None = None, own: dict | None = None, **training) -> dict:
    flags = RecipeTrainingArguments(**{"output_dir": "out", "use_cpu": True, **training})
    found = recipe_settings(flags, Arguments(**(own or {})), ReRAMArguments(**(reram or {})))
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "flags",
    [
        {"optim": "sgd"},
        {"gradient_accumulation_steps": 8},
        {"weight_decay": 0.1},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"warmup_steps": 0.2},
        {"max_grad_norm": 0.5},
        {"adam_beta2": 0.95},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"data_seed": 3},
        {"dataloader_drop_last": True},
        {"neftune_noise_alpha": 5.0},
        {"max_steps": 10},
        {"num_train_epochs": 2.0},
        {"own": {"train_file": "b.parquet"}},
        {"reram": {"teacher": True}},
    ],
    ids=str,
)
def test_what_changes_the_weights_changes_the_settings(flags):
    before, now = settings(), settings(**flags)
    assert before == settings()
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    names = {name for value in flags.values() if isinstance(value, dict) for name in value} | flags.keys()
    assert changed and changed <= names | {"max_steps"}  # which epochs set aside


@pytest.mark.parametrize(
    "flags",
    [
        {"output_dir": "elsewhere", "run_name": "second"},
        {"save_steps": 5, "save_total_limit": 3, "logging_steps": 1, "logging_first_step": True, "log_level": "error"},
        {"per_device_eval_batch_size": 2, "eval_accumulation_steps": 3},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_pin_memory": False},
        {"hub_model_id": "someone/robust", "hub_private_repo": True, "disable_tqdm": True},
        {"reram": {"allow_uncalled": True}},
        {"reram": {"times": ["1s"], "chips": 3, "methods": ["naive"]}},
    ],
    ids=str,
)
def test_what_does_not_may_be_another(flags):
    assert settings(**flags) == settings()


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_steps": 7},
        {"save_steps": 14, "eval_steps": 14},
        {"metric_for_best_model": "f1", "greater_is_better": True},
        {"greater_is_better": True},
        {"per_device_eval_batch_size": 3},
    ],
    ids=str,
)
def test_what_chooses_the_best_checkpoint_counts_where_it_is_loaded(flags):
    chosen = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 35}
    before, now = settings(**chosen), settings(**chosen | flags)
    assert {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} == flags.keys()
    assert settings(**chosen, save_total_limit=3, logging_steps=1) == before


def test_the_precision_that_a_launcher_sets_counts(monkeypatch):
    plain = settings()
    assert "mixed_precision" not in plain and "mixed_precision" not in settings(bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings() == {**plain, "mixed_precision": "bf16"}
    assert settings(bf16=True).get("mixed_precision") is None


def test_no_token_is_kept():
    token = "hf_" + "aB3" * 12
    found = settings(own={"train_file": f"https://me:{token}@huggingface.co/d"}, lr_scheduler_kwargs={"token": "own"})
    assert (found["train_file"], found["lr_scheduler_kwargs"]) == (
        "https://me:hf_...@huggingface.co/d",
        {"token": "hf_..."},
    )
    assert token not in json.dumps(settings(hub_token=token))


def test_what_is_neutral_are_arguments_of_transformers():
    """A misspelt one would be compared."""
    known = RecipeTrainingArguments(output_dir="out", use_cpu=True).to_dict()
    assert set(NEUTRAL) - known.keys() <= {"overwrite_output_dir"}  # of earlier versions
    assert all(any(name.startswith(kind) for name in known) for kind in NEUTRAL_KINDS)
