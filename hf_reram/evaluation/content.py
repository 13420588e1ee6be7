"""What an evaluation is measured on and with, as a fingerprint that is the same in another process."""

import enum
import functools
import hashlib
import json
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from ..model.digest import settings_of, weights_digest
from .code import globals_of, imports_of, is_installed, source_of
from .data_files import content_under, files_of, row_content

# Of a class, what makes its instances do what they do.
OF_CLASSES = (
    *(bool, int, float, str, bytes, tuple, list, dict, set, frozenset, np.ndarray, np.generic, torch.Tensor),
    *(types.FunctionType, staticmethod, classmethod, property, functools.partial, functools.cached_property, type),
)
BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
# Of a tokenizer beside its vocabulary.
TOKENIZER = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "special_tokens_map")


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
        return part_of("data set", dataset, files=True)
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
        for path in files_of(table):
            digest.update(_content_in(path).encode())
    if dataset.format["type"] is not None:  # what becomes of the rows
        digest.update(part_of("data set's transform", dataset.format, files=True).encode())
    return digest.hexdigest()


def _content_in(path: str) -> str:
    try:
        return row_content(path)
    except ValueError as error:
        raise ValueError(
            f"the data set cannot be told from another one: say with key=... what is evaluated: {error}"
        ) from error


def part_of(name: str, value: Any, files: bool = False) -> Any:
    """:func:`described` of a part of what is evaluated, with what is in ``files`` that it names where that is asked
    for.

    Raises:
        ValueError: it cannot be told; names it.
    """
    try:
        return described(value, files)
    except ValueError as error:
        raise ValueError(
            f"the {name} cannot be told from another one: say with key=... what is evaluated: {error}"
        ) from error


def described(value: Any, files: bool = False) -> Any:
    """A JSON value that another value has only if it is the same: numbers and texts as they are, all else as a SHA-256
    of what it is made of. Functions are their code, with what they close over, and all that they name, modules of a
    script's own by what is read of them; models their settings and weights; other objects their class and what they
    pickle. Of installed packages names alone count.

    Args:
        files: texts and paths that name a file or folder stand for what is in it.

    Raises:
        ValueError: parts of it cannot be told, as locks or open files.
    """
    try:
        return _Description(files).of(value)
    except ValueError:
        raise
    except Exception as error:  # whatever its parts raise
        raise ValueError(f"{type(value).__name__} cannot be read: {type(error).__name__}: {error}") from error


class _Description:
    def __init__(self, files: bool) -> None:
        self.files = files
        self.read: dict[tuple[str, bool], str | None] = {}  # what is in files, by their path
        self.in_code = False
        self.known: dict[int, tuple[Any, str]] = {}  # holds on to the values, whose ids others would get
        self.above: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
            value = value.item() if isinstance(value, np.generic) else value
            return value if (inside := self.inside(value)) is None else f"{value} {inside}"
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.above:
            return ["around", len(self.above) - self.above[id(value)]]
        self.above[id(value)] = len(self.above)
        try:
            parts = self.parts(value)
        finally:
            del self.above[id(value)]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.known[id(value)] = (value, digest)
        return digest

    def inside(self, value: Any) -> str | None:
        """What is in the file or folder that a text or path names."""
        if not self.files or not isinstance(value, (str, PurePath)):
            return None
        asked = str(value), not self.in_code  # whose texts are words that may also be a folder's name
        if asked not in self.read:
            self.read[asked] = content_under(*asked)
        return self.read[asked]

    def parts(self, value: Any) -> list:
        """What a value is made of, as JSON values."""
        of = self.of
        if isinstance(value, (torch.dtype, torch.device, np.dtype, enum.Enum, complex, PurePath, type(...))):
            return [str(value), *([] if (inside := self.inside(value)) is None else [inside])]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return ["bytes", hashlib.sha256(value).hexdigest()]
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            return [str(value.dtype), list(value.shape), *self.parts(value.reshape(-1).view(torch.uint8).numpy().data)]
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if type(value) in (list, tuple):
            return [type(value).__name__, *map(of, value)]
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted(json.dumps(of(item)) for item in value)]
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            return ["dict", *([of(key), of(item)] for key, item in value.items())]
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.MethodType):
            return ["method", of(value.__func__), of(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", of(value.func), of(value.args), of(value.keywords)]
        if isinstance(value, (staticmethod, classmethod)):
            return [of(value.__func__)]
        if isinstance(value, property):
            return ["property", of(value.fget)]
        if isinstance(value, functools.cached_property):
            return ["property", of(value.func)]
        if isinstance(value, types.CodeType):
            around, self.in_code = self.in_code, True
            constants = [of(part) for part in value.co_consts]
            self.in_code = around
            return ["code", value.co_code.hex(), list(value.co_names), *constants]
        if isinstance(value, (types.ModuleType, *BUILT_IN)):
            owner = getattr(value, "__self__", None)
            name = [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]
            return ["named", *name, *([] if owner is None or isinstance(owner, types.ModuleType) else [of(owner)])]
        if isinstance(value, type):
            return [_name(value), *(of(part) for base in value.__mro__ for part in self.body(base))]
        return self.object(value)

    def function(self, value: types.FunctionType) -> list:
        of, code = self.of, value.__code__
        inside = [of(cell.cell_contents) if cell != types.CellType() else None for cell in value.__closure__ or ()]
        parts = [_name(value), of(value.__defaults__), of(value.__kwdefaults__), *inside]
        if is_installed(value.__module__):
            return parts
        used = []
        for name, chains in sorted(globals_of(code).items()):
            if name in value.__globals__ and name[:2] != "__":
                item = value.__globals__[name]
                module = isinstance(item, types.ModuleType) and not is_installed(item.__name__)
                used.append([name, self.read_of(item, chains) if module else of(item)])
        imported = source_of(imports_of(code, value.__globals__.get("__package__") or ""))
        own = {name: part for name, part in vars(value).items() if name != "__wrapped__"}
        return [*parts, of(code), *used, *([imported] if imported else []), *([of(own)] if own else [])]

    def read_of(self, module: types.ModuleType, chains: Iterable[tuple[str, ...]]) -> list:
        """What code reads of a module that is no installed package's; where it takes the module itself, its source."""
        found: list[Any] = []
        for chain in sorted(chains):
            value: Any = module
            for name in chain:
                if not isinstance(value, types.ModuleType) or is_installed(value.__name__):
                    break
                value = getattr(value, name, None)
            whole = isinstance(value, types.ModuleType) and not is_installed(value.__name__)
            found.append([*chain, source_of([value.__name__]) if whole else self.of(value)])
        return found

    def body(self, cls: type) -> Iterator[Any]:
        """What makes instances of a class do what they do, and is no installed package's."""
        if is_installed(cls.__module__):
            return
        for name, part in sorted(vars(cls).items()):
            special = name.startswith("__") and name.endswith("__")  # of these, what they do
            kinds = (types.FunctionType, staticmethod, classmethod) if special else OF_CLASSES
            if isinstance(part, kinds) or callable(getattr(part, "__wrapped__", None)):
                yield [name, part]

    def object(self, value: Any) -> list:
        from datasets import Dataset
        from transformers import PreTrainedTokenizerBase

        of = self.of
        if isinstance(value, Dataset):
            return ["data", content_of(value)]
        if isinstance(value, torch.nn.Module):  # as a collator has it: what it computes, not what it remembers
            return [of(type(value)), settings_of(value), weights_digest(value)]
        if isinstance(value, PreTrainedTokenizerBase):
            return [_name(type(value)), _vocabulary(value), *(of(getattr(value, name, None)) for name in TOKENIZER)]
        if type(value).__module__.startswith("transformers.") and callable(getattr(value, "to_dict", None)):
            data = value.to_dict()
            return [_name(type(value)), of({key: data[key] for key in data if key not in UNTOLD})]
        if any(cls.__module__ == "evaluate.module" for cls in type(value).__mro__) and hasattr(value, "config_name"):
            return [of(type(value)), value.config_name]  # what else it holds is of its last use
        if callable(inner := getattr(value, "__wrapped__", None)):  # as functools.cache has it
            return [_name(type(value)), of(inner)]
        try:
            made = value.__reduce_ex__(4)
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"nothing tells one {_name(type(value))} from another: {error}") from error
        if isinstance(made, str):
            return [_name(type(value)), made]
        _, args, state, items, pairs = (*made, *[None] * 5)[:5]
        if isinstance(state, dict):  # without what says of which columns and the like a collator has warned
            state = {name: part for name, part in state.items() if "warned" not in str(name)}
        return [of(type(value)), of(tuple(args)), of(state), of(list(items or ())), of(list(pairs or ()))]


UNTOLD = ("_name_or_path", "transformers_version", "_commit_hash")


def _vocabulary(tokenizer: Any) -> str:
    """Of a fast tokenizer all that it does, without how it cut and padded last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {name: part for name, part in data.items() if backend is None or name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _name(value: Any) -> str:
    """With the module only where it is an installed one: a script's is another where it is imported."""
    return f"{value.__module__}.{value.__qualname__}" if is_installed(value.__module__) else value.__qualname__
