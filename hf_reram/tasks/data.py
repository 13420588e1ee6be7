"""Data sets for the recipes, from the Hub, a file or a folder."""

from pathlib import Path
from typing import Any

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def load_rows(name: str, split: str, file: str | None = None, folder: str | None = None) -> Any:
    """A data set.

    Args:
        name, split: on the Hub, unless a file or a folder is given.
        file: parquet or JSON. folder: with a folder of images for each class.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of another kind.
    """
    from datasets import load_dataset

    path = folder or file
    if path is None:
        return load_dataset(name, split=split)
    if not Path(path).exists():
        raise FileNotFoundError(f"no such path {path}")
    if folder:
        return load_dataset("imagefolder", data_dir=folder, split="train")
    kind = KINDS.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"{path}: allowed are {', '.join(KINDS)} files")
    return load_dataset(kind, data_files=path, split="train")


def draw(dataset: Any, count: int | None, seed: int) -> Any:
    """``count`` rows drawn at random; all of them, in their order, where there are no more or ``count`` is None."""
    return dataset if count is None or count >= len(dataset) else dataset.shuffle(seed=seed).select(range(count))
