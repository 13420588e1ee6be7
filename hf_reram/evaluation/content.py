"""What an evaluation is measured on and with, as a fingerprint that is the same in another process."""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from ..model.attributes import OF_LIBRARIES
from ..model.description import Description, added_attributes, arguments_of, kinds_of, parts_added
from ..model.digest import settings_of, weights_digest
from ..model.find import unwrapped
from ..model.installed import is_installed
from .data_files import content_under, files_of, row_content
from .run_log import versions

# What an evaluation depends on of a Trainer, beside its model, data and arguments.
TRAINER = (
    *("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "label_names", "_gen_kwargs"),
    *("data_collator", "processing_class"),
    "evaluator",  # of sentence-transformers
)


def content_of(dataset: Any) -> str:
    """SHA-256 of a data set's content, in hexadecimal: of its rows in their order where it is one of ``datasets``, with
    the files that they name and the transform that it applies to them, else of the object, with files and folders that
    texts in it name.

    Raises:
        ValueError: it has no fixed content, or cannot be pickled.
    """
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        raise ValueError("a streamed data set has no fixed content: say with key=... what is evaluated")
    if not isinstance(dataset, Dataset):
        return part_of("data set", dataset)
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
        for path in files_of(table):
            digest.update(_content_in(path).encode())
    if dataset.format != dataset.with_format(None).format:  # what becomes of the rows, and which columns are seen
        digest.update(part_of("data set's transform", dataset.format).encode())
    return digest.hexdigest()


def _content_in(path: str) -> str:
    try:
        return row_content(path)
    except ValueError as error:
        raise ValueError(
            f"the data set cannot be told from another one: say with key=... what is evaluated: {error}"
        ) from error


def described(value: Any) -> Any:
    """What tells a value, see :class:`Evaluated`.

    Raises:
        ValueError: parts of it cannot be told, as locks or open files.
    """
    return Evaluated().whole(value)


def part_of(name: str, value: Any) -> Any:
    """:func:`described` of a part of what is evaluated.

    Raises:
        ValueError: it cannot be told; names it.
    """
    return key_of(name, value)[name]


def key_of(name: str, value: Any, model: Any = None, log: str | os.PathLike | None = None) -> dict[str, Any]:
    """As :func:`part_of`, under the name, and beside it what tells its own parts from others, such as an object's
    attributes, a function's variables and globals or the files that it names, each under its name after the other and a
    dot.

    Args:
        model, log: see :class:`Evaluated`.

    Raises:
        ValueError: it cannot be told; names it.
    """
    return Evaluated(model, log).key(name, value)


class Evaluated(Description):
    """What tells parts of an evaluation: files and folders that texts and paths in it name count by what is in them,
    data sets by their rows, models by their settings and weights, Trainers by what their evaluations depend on, and
    installed packages by their versions.

    Args:
        model: that is evaluated, and told elsewhere. sentence-transformers' evaluators go by its similarity where they
            have none.
        log: a file that the evaluation is noted in; folders that hold it are names.
        data: that it is evaluated on, and that is told elsewhere.
    """

    def __init__(self, model: Any = None, log: str | os.PathLike | None = None, data: Any = None) -> None:
        super().__init__()
        self.model, self.data = model, data
        self.log = None if log is None else Path(log).absolute()
        self.files: dict[str, str | None] = {}  # what is in files, by their path

    def key(self, name: str, value: Any) -> dict[str, Any]:
        """As :func:`key_of`.

        Raises:
            ValueError: the value cannot be told; names it.
        """
        try:
            told = {name: self.whole(value), **{f"{name}.{part}": each for part, each in self.named.items()}}
        except ValueError as error:
            raise ValueError(
                f"the {name} cannot be told from another one: say with key=... what is evaluated: {error}"
            ) from error
        return told | {f"{name}.file {path}": digest for path, digest in self.files.items() if digest is not None}

    def plain(self, value: Any) -> Any:
        return value if (inside := self.inside(value)) is None else f"{value} {inside}"

    def inside(self, value: Any) -> str | None:
        """What is in the file or folder that a text or path names."""
        if not isinstance(value, (str, PurePath)):
            return None
        if (path := str(value)) not in self.files:
            holds_log = self.log is not None and self.log.is_relative_to(Path(path).absolute())
            self.files[path] = None if holds_log else content_under(value)
        return self.files[path]

    def parts(self, value: Any) -> list:
        found = super().parts(value)
        if isinstance(value, PurePath) and (inside := self.inside(value)) is not None:
            found.append(inside)
        return found

    def name(self, value: Any) -> str:
        module = getattr(value, "__name__" if isinstance(value, type(os)) else "__module__", None) or ""
        package = module.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", None)
        # Others of these are other runs, whatever the key says.
        told = isinstance(version, str) and package not in versions() and is_installed(module)
        return f"{super().name(value)} {version}" if told else super().name(value)

    def object(self, value: Any) -> list:
        from datasets import Dataset, IterableDataset

        of, cls = self.of, type(value)
        if value is self.model or value is self.data:
            return ["told elsewhere"]
        if isinstance(value, (Dataset, IterableDataset)) and not hasattr(cls, "told_by"):
            return ["data", content_of(value)]
        if "Trainer" in kinds_of(value):
            return self.trainer(value)
        places = {each.__module__: each for each in cls.__mro__}
        if "evaluate.module" in places and hasattr(value, "config_name"):
            # What the library sets there is of its last use.
            return [of(cls), value.config_name, of(added_attributes(value, "evaluate"))]
        if "sentence_transformers.base.evaluation.evaluator" in places:
            return [of(cls), {name: of(part) for name, part in self.evaluator_parts(value).items()}]
        return super().object(value)

    def evaluator_parts(self, value: Any) -> dict[str, Any]:
        """Attributes of one of sentence-transformers' evaluators as they are before its first use."""
        found = {name: part for name, part in vars(value).items() if name not in ("primary_metric", "csv_headers")}
        own = getattr(unwrapped(self.model), "similarity_fn_name", None)
        if found.get("similarity_fn_names") == []:
            found["similarity_fn_names"] = [own]
        if found.get("_score_functions_from_model"):
            found |= {"score_functions": None, "score_function_names": [own]}
        if isinstance(pairs := found.get("duplicates"), Mapping):  # which looking up fills
            found["duplicates"] = {name: [other for other in pairs[name] if pairs[name][other]] for name in pairs}
            found["duplicates"] = {name: sorted(others) for name, others in found["duplicates"].items() if others}
        return found

    def trainer(self, value: Any) -> list:
        """What an evaluation by a Trainer depends on, and what code reads of what a script has set on it."""
        known = {name: getattr(value, name, None) for name in (*TRAINER, "model", "eval_dataset")}
        path = f"{self.label}.args".lstrip(".")
        told = self.read_of(value, *parts_added(value, known, runs=True))
        self.label = path
        return [*told, self.read_of(value.args, *arguments_of(value.args))]

    def module(self, value: nn.Module) -> list:
        """What it computes, not what it remembers."""
        of = self.of
        if isinstance(value, torch.jit.ScriptModule):
            code = [[name, part.code] for name, part in value.named_modules() if hasattr(part, "code")]
            return [self.name(type(value)), code, weights_digest(value)]
        classes = sorted({of(type(module)) for module in value.modules()})
        own = {
            name: {each: of(part) for each, part in vars(module).items() if each not in OF_LIBRARIES}
            for name, module in value.named_modules()
            if not is_installed(type(module).__module__)
        }
        return [of(type(value)), [settings_of(value), weights_digest(value), own], classes]
