"""Checkpoints that are there whole or not at all, whatever interrupts the saving."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from ..config import ReRAMConfig
from ..device.checks import read_json

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"  # Trainer writes it last
STAGING = ".incomplete"
MARK = ".hf_reram-saving"
CONFIGS = "hf_reram.json"
CARD = "README.md"  # PEFT writes one with every save


@contextmanager
def staged(folder: str | os.PathLike) -> Iterator[str]:
    """Another folder to write into, whose files then replace those of the same name in ``folder``, except a README.md,
    in which a person may have written. If writing fails, ``folder`` is as it was."""
    folder = Path(folder)
    staging, number = folder / STAGING, 1
    while staging.exists() and not (staging / MARK).exists():  # a person's
        staging, number = folder / f"{STAGING}-{number}", number + 1
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir(parents=True)
    (staging / MARK).touch()
    try:
        yield str(staging)
        for path in sorted(path for path in staging.rglob("*") if path.is_file() and path != staging / MARK):
            target = folder / path.relative_to(staging)
            if path.name == CARD and target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def marked(checkpoint: str | os.PathLike) -> Iterator[None]:
    """A mark in a checkpoint's folder for as long as it is being saved: it is left where that is interrupted."""
    folder = Path(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    yield
    (folder / MARK).unlink(missing_ok=True)


def write_configs(configs: list[ReRAMConfig], checkpoint: str | os.PathLike) -> None:
    """Have a checkpoint say what hardware it was trained on, whatever else stands in it: beside adapters and shards
    there is no config.json."""
    text = json.dumps([config.to_dict() for config in configs], indent=2)
    (Path(checkpoint) / CONFIGS).write_text(text + "\n", encoding="utf-8")


def read_configs(checkpoint: str | os.PathLike) -> list[ReRAMConfig] | None:
    """What :func:`write_configs` wrote, None where it wrote nothing.

    Raises:
        ValueError: the file holds something else.
    """
    file = Path(checkpoint) / CONFIGS
    if not file.exists():
        return None
    stored = read_json(file)
    if not isinstance(stored, list) or not all(isinstance(config, dict) for config in stored):
        raise ValueError(f"{file} holds {stored!r:.80}: allowed is a list of ReRAMConfigs")
    return [ReRAMConfig.from_dict(config) for config in stored]


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last of a Trainer's checkpoints in ``folder`` that was saved to its end, None if there is none."""
    whole = [path for path in _checkpoints(folder) if is_whole(path)]
    return str(whole[-1]) if whole else None


def set_incomplete_aside(folder: str | os.PathLike) -> None:
    """Rename checkpoints whose saving was interrupted, as our own mark in them says, to ``incomplete-checkpoint-N``: to
    Trainer they would be the newest, so that it would resume from them. Nothing is deleted, and what has no mark stays
    as it is."""
    for path in _checkpoints(folder):
        if not (path / MARK).exists():
            continue
        aside, number = path.with_name(f"incomplete-{path.name}"), 1
        while aside.exists():
            aside, number = path.with_name(f"incomplete-{path.name}-{number}"), number + 1
        logger.warning("%s was not saved to its end and is now %s; it can be deleted", path, aside)
        path.rename(aside)


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved to its end."""
    return not (Path(checkpoint) / MARK).exists() and (Path(checkpoint) / STATE).exists()


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """By their steps."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    folder = Path(folder)
    steps = {
        path: int(found[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    return sorted(steps, key=steps.__getitem__)
