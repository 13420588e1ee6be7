"""Data sets for the recipes, from the Hub, a file or a folder, and their texts as batches."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}


def load_rows(
    name: str, split: str, file: str | None = None, folder: str | None = None, config_name: str | None = None
) -> Any:
    """A data set.

    Args:
        name, split: on the Hub, unless a file or a folder is given.
        file: parquet, JSON, or plain text in UTF-8, whose paragraphs, between empty lines, are the rows.
        folder: with a folder of images for each class.
        config_name: which configuration of the data set on the Hub, where it has several.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of another kind, one that cannot be read, without a row, or whose text is not UTF-8.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = folder or file
    if path is None:
        return load_dataset(name, config_name, split=split)
    if not Path(path).exists():
        raise FileNotFoundError(f"no such path {path}")
    if folder:
        return load_dataset("imagefolder", data_dir=folder, split="train")
    kind = KINDS.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"{path}: allowed are {', '.join(KINDS)} files")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path} is empty: allowed is at least one row")
    try:
        if kind == "text":
            text = Path(path).read_text(encoding="utf-8-sig")  # without a byte order mark, where there is one
            return Dataset.from_dict({"text": [part.strip("\n") for part in re.split(r"\n\s*\n", text)]})
        if kind == "json":  # of which datasets says nothing before the row is used
            with open(path, encoding="utf-8") as lines:
                while lines.read(1 << 20):
                    pass
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    try:
        return load_dataset(kind, data_files=path, split="train")
    except (DatasetGenerationError, ValueError) as error:  # which do not name the file
        why = error.__cause__ or error
        raise ValueError(f"{path} holds no rows that can be read as {kind}: {why}") from error


def load_tokenizer(name: str, **options: Any) -> Any:
    """A checkpoint's tokenizer, with ``options`` of its ``from_pretrained``.

    Raises:
        ValueError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        if not os.path.isdir(name):
            raise ValueError(f"{name} is no folder here, and no tokenizer comes from the Hub ({error})") from error
        raise ValueError(f"{name} has no tokenizer, which texts need ({error})") from error


def draw(dataset: Any, count: int | None, seed: int) -> Any:
    """``count`` rows drawn at random; all of them, in their order, where there are no more or ``count`` is None."""
    return dataset if count is None or count >= len(dataset) else dataset.shuffle(seed=seed).select(range(count))


class Batches(list):
    """What a model is evaluated on, as batches. A fingerprint of an evaluation is of their rows: it is the same for
    other numbers of rows a batch. On these no figure depends but for rounding, and but for read noise: it is drawn
    for each forward, so that in other batches a chip has other figures, of the same distribution.

    Args:
        batches: of model inputs. rows: all that is in them.
    """

    def __init__(self, batches: Iterable[Any], rows: Any):
        super().__init__(batches)
        self.rows = rows

    def told_by(self) -> Any:
        """What tells them from others, see :func:`hf_reram.evaluation.content.described`."""
        return self.rows


def batches_by_length(encoded: Mapping[str, Sequence], tokenizer: Any, batch_size: int, **padding: Any) -> Batches:
    """What a tokenizer has made of texts, as padded batches, each with its texts' places. Texts of like length are
    together, which needs less padding.

    Args:
        padding: of the tokenizer's ``pad``.
    """
    order = sorted(range(len(encoded["input_ids"])), key=lambda i: len(encoded["input_ids"][i]))
    batches = []
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = {key: [values[i] for i in part] for key, values in encoded.items()}
        batches.append((part, dict(tokenizer.pad(rows, return_tensors="pt", **padding))))
    rows = {key: [np.asarray(row) for row in values] for key, values in encoded.items()}
    return Batches(batches, [rows, padding, tokenizer.padding_side, tokenizer.pad_token_id])
