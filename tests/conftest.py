"""What several tests need: small models, a small device, the data folder."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: two workers with all threads each would slow one another
    os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_reram import DeviceConfig, ReRAMConfig

# The same examples each time, so that a change fails for what it did; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def device(**changes) -> DeviceConfig:
    """The NeuRRAM preset with some fields changed."""
    return DeviceConfig.from_dict({**DeviceConfig.from_preset("hfox-neurram").to_dict(), **changes})


def straight(**fields) -> ReRAMConfig:
    """A config whose crossbar is an ideal linear one: no curvature, no clipping, no loss."""
    options = {"device": device(v0=1e6), "range_shrink": 1.0, "weight_clip": None, "retention_loss": "none"}
    return ReRAMConfig(**{**options, **fields})


@pytest.fixture
def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def bert_batch(n: int = 8, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[::2, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(3, (n,), generator=generator),
    }


@pytest.fixture
def data_folder() -> Path:
    folder = os.environ.get("HF_RERAM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HF_RERAM_DATA names no folder")
    return Path(folder)
