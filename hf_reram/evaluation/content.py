"""What an evaluation is measured on and with, as a fingerprint that is the same in another process."""

import enum
import functools
import hashlib
import json
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from ..model.digest import settings_of, weights_digest

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
OWN = __name__.partition(".")[0]
# Of what a function names, this is told in full.
TOLD = (
    *(bool, int, float, str, bytes, tuple, list, dict, set, frozenset, type, np.ndarray, np.generic, torch.Tensor),
    *(types.FunctionType, types.ModuleType, functools.partial),
)
BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
# Of a tokenizer beside its vocabulary.
TOKENIZER = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "special_tokens_map")


def content_of(dataset: Any) -> str:
    """SHA-256 of a data set's content, in hexadecimal: of its rows in their order where it is one of ``datasets``, with
    the transform that it applies to them, else of the object.

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
    if dataset.format["type"] is not None:  # what becomes of the rows
        digest.update(part_of("data set's transform", dataset.format).encode())
    return digest.hexdigest()


def part_of(name: str, value: Any) -> Any:
    """:func:`described` of a part of what is evaluated.

    Raises:
        ValueError: it cannot be told; names it.
    """
    try:
        return described(value)
    except ValueError as error:
        raise ValueError(
            f"the {name} cannot be told from another one: say with key=... what is evaluated: {error}"
        ) from error


def described(value: Any) -> Any:
    """A JSON value that another value has only if it is the same: numbers and texts as they are, all else as a SHA-256
    of what it is made of. Functions are their code, with what they close over, and the functions, plain data and
    classes of objects that they name; models their settings and weights; other objects their class and what they
    pickle. Of installed packages names alone count.

    Raises:
        ValueError: parts of it cannot be told, as locks or open files.
    """
    try:
        return _Description().of(value)
    except ValueError:
        raise
    except Exception as error:  # whatever its parts raise
        raise ValueError(f"{type(value).__name__} cannot be read: {type(error).__name__}: {error}") from error


class _Description:
    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, str]] = {}  # holds on to the values, whose ids others would get
        self.above: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
            return value.item() if isinstance(value, np.generic) else value
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

    def parts(self, value: Any) -> list:
        """What a value is made of, as JSON values."""
        of = self.of
        if isinstance(value, (torch.dtype, torch.device, np.dtype, enum.Enum, complex, PurePath, type(...))):
            return [str(value)]
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
        if isinstance(value, types.CodeType):
            return ["code", value.co_code.hex(), list(value.co_names), *map(of, value.co_consts)]
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
        if _is_installed(value.__module__):
            return parts
        named = {
            name: value.__globals__[name]
            for name in sorted(_names(code))
            if name in value.__globals__ and name[:2] != "__"
        }
        # Of other objects the class: they may be large, and change in an evaluation.
        used = [
            [name, of(item if item is None or isinstance(item, TOLD) else type(item))] for name, item in named.items()
        ]
        return [*parts, of(code), *used]

    def body(self, cls: type) -> Iterator[Any]:
        """What makes instances of a class do what they do, and is no installed package's."""
        if _is_installed(cls.__module__):
            return
        kinds = (types.FunctionType, staticmethod, classmethod, property, bool, int, float, str)
        for name, part in sorted(vars(cls).items()):
            if isinstance(part, kinds) and name not in ("__module__", "__doc__", "__firstlineno__"):
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
        if callable(inner := getattr(value, "__wrapped__", None)):  # as functools.cache has it
            return [_name(type(value)), of(inner)]
        try:
            made = value.__reduce_ex__(4)
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"nothing tells one {_name(type(value))} from another: {error}") from error
        if isinstance(made, str):
            return [_name(type(value)), made]
        _, args, state, items, pairs = (*made, *[None] * 5)[:5]
        return [of(type(value)), of(tuple(args)), of(state), of(list(items or ())), of(list(pairs or ()))]


UNTOLD = ("_name_or_path", "transformers_version", "_commit_hash")


def _vocabulary(tokenizer: Any) -> str:
    """Of a fast tokenizer all that it does, without how it cut and padded last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {name: part for name, part in data.items() if backend is None or name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _name(value: Any) -> str:
    """With the module only where it is an installed one: a script's is another where it is imported."""
    return f"{value.__module__}.{value.__qualname__}" if _is_installed(value.__module__) else value.__qualname__


def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's, of an installed package or of this one: its version says what it does."""
    if module == "__main__" or module not in sys.modules:
        return False
    file = getattr(sys.modules[module], "__file__", None)
    return module.partition(".")[0] == OWN or file is None or file.startswith(LIBRARIES)
