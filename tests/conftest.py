"""What several tests need: seeded draws, a small model, processes; and what their marks ask for."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: two workers with all threads each would slow one another
    os.environ["OMP_NUM_THREADS"] = "1"

import gc
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.samples.interpreter import Interpreter

if TYPE_CHECKING:  # pytest's first process hands out the tests: it needs no torch, and its start would wait for it
    from transformers import BertForSequenceClassification

# The same examples each time, so that a change fails for what it did; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: each Trainer collects garbage, a third of a second among all of it


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("compiler") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_probes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("many_probes") is None:  # of two examples 1,024 take seconds
        monkeypatch.setattr("hf_reram.calibration.sensitivity.DRAWN", 64)


@pytest.fixture
def tiny_bert() -> "BertForSequenceClassification":
    from tests.samples import models

    return models.tiny_bert()


@pytest.fixture(scope="session")
def python() -> Iterator[Interpreter]:
    """Starts processes of Python in a fraction of the time that their imports take."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
