"""What an evaluation is measured on and with, as a fingerprint that is the same in another process."""

import copyreg
import enum
import functools
import hashlib
import json
import random
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from ..model.digest import settings_of, weights_digest
from .code import changed_in, changed_in_use, globals_of, imports_of, is_installed, set_since, source_of
from .data_files import content_under, files_of, row_content

BUILT_IN = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc),
    *(types.MemberDescriptorType, types.GetSetDescriptorType),
)
CONTAINERS = (list, dict, set, deque)
# Of what transformers has: where it is from, how it is stored and called, and what its class says.
UNTOLD = (
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "vocab_file", "merges_file"),
    *("init_inputs", "init_kwargs", "files_loaded", "verbose", "deprecation_warnings", "_in_target_context_manager"),
    *("_processor_class", "processor_class", "backend"),
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
        return part_of("data set", dataset, files=True)
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
        for path in files_of(table):
            digest.update(_content_in(path).encode())
    if dataset.format != dataset.with_format(None).format:  # what becomes of the rows, and which columns are seen
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
    pickle, or what their method ``told_by`` says. What use sets and fills, caches and counters, does not count, and of
    installed packages only names.

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
        self.read: dict[str | PurePath, str | None] = {}  # what is in files, by their path
        self.known: dict[int, tuple[Any, str]] = {}  # holds on to the values, whose ids others would get
        self.above: dict[int, int] = {}
        self.uses: dict[int, tuple[Any, set[str]]] = {}  # what code takes of values, by their ids

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
        if value not in self.read:
            self.read[value] = content_under(value)
        return self.read[value]

    def parts(self, value: Any) -> list:
        """What a value is made of, as JSON values."""
        of = self.of
        if isinstance(value, (torch.dtype, torch.device, np.dtype, complex, PurePath, type(...))):
            return [str(value), *([] if (inside := self.inside(value)) is None else [inside])]
        if isinstance(value, enum.Enum):
            return ["enum", of(type(value)), of(value.value)]
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
            return ["property", of(value.fget), of(value.fset)]
        if isinstance(value, functools.cached_property):
            return ["property", of(value.func)]
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
        bound, altered, named = changed_in(code)
        closed = zip(code.co_freevars, value.__closure__ or ())
        inside = {name: cell.cell_contents for name, cell in closed if cell != types.CellType()}
        self.use(inside, named)
        kept = self.without_state(inside, bound, altered)
        parts = [_name(value), of(value.__defaults__), of(value.__kwdefaults__), *(of(kept[name]) for name in kept)]
        if is_installed(value.__globals__.get("__name__")):  # a decorator may have given it another __module__
            return parts
        reads = globals_of(code)
        known = {name: value.__globals__[name] for name in sorted(reads) if name in value.__globals__}
        self.use(known, named)
        used = []
        for name, item in self.without_state(known, bound, altered).items():
            if name[:2] != "__":
                module = isinstance(item, types.ModuleType) and not is_installed(item.__name__)
                used.append([name, self.read_of(item, reads[name]) if module else of(item)])
        imported = self.source(imports_of(code, value.__globals__.get("__package__") or ""))
        own = {name: part for name, part in vars(value).items() if name != "__wrapped__"}
        return [*parts, of(code), *used, *([imported] if imported else []), *([of(own)] if own else [])]

    @staticmethod
    def without_state(values: dict, bound: Collection[str], altered: Collection[str]) -> dict:
        """Those that are not set, nor if they are lists or the like changed, nor tensors overwritten, by what they are
        values of. Containers of libraries, such as data sets, count."""

        def is_filled(name: str, value: Any) -> bool:
            if isinstance(value, (torch.Tensor, np.ndarray)):
                return f"{name}[:]" in altered
            plain = type(value).__module__ in ("builtins", "collections") or not is_installed(type(value).__module__)
            return name in altered and isinstance(value, CONTAINERS) and plain

        return {name: value for name, value in values.items() if name not in bound and not is_filled(name, value)}

    def use(self, values: dict, named: Iterable[str]) -> None:
        """Note down which attributes code takes of values, by their names."""
        for found in named:
            name, _, attribute = found.partition(" ")
            if attribute and name in values:
                self.uses.setdefault(id(values[name]), (values[name], set()))[1].add(attribute)

    def source(self, names: Iterable[str]) -> list:
        """Of modules of a script's own their files, and what has been set in them since."""
        return [
            [name, digest, *([self.of(changed)] if (changed := set_since(name)) else [])]
            for name, digest in source_of(names)
        ]

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
            found.append([*chain, self.source([value.__name__]) if whole else self.of(value)])
        return found

    def body(self, cls: type) -> Iterator[Any]:
        """What makes instances of a class do what they do, and is no installed package's."""
        if is_installed(cls.__module__):
            return
        _, altered, named = changed_in_use(cls)
        self.use(dict(vars(cls)), named)
        for name, part in sorted(self.without_state(dict(vars(cls)), (), altered).items()):
            special = name.startswith("__") and name.endswith("__")  # of these, what they do
            if name != "_abc_impl" and (not special or callable(part) or isinstance(part, (staticmethod, classmethod))):
                yield [name, part]

    def object(self, value: Any) -> list:
        from datasets import Dataset, IterableDataset
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerBase, ProcessorMixin

        of = self.of
        cls: Any = type(value)
        _, uses = self.uses.get(id(value), (value, set()))
        if callable(getattr(cls, "told_by", None)):
            return [of(cls), of(value.told_by())]
        if isinstance(value, (Dataset, IterableDataset)):
            return ["data", content_of(value)]
        if isinstance(value, torch.utils.data.Dataset) and not self.files:
            return ["data", described(value, files=True)]
        if isinstance(value, torch.nn.Module):  # as a collator has it: what it computes, not what it remembers
            classes = sorted({of(type(module)) for module in value.modules()})
            return [of(cls), settings_of(value), weights_digest(value), classes]
        if isinstance(value, Tokenizer):  # without how it cut and padded last
            text = json.dumps({**json.loads(value.to_str()), "truncation": None, "padding": None}, sort_keys=True)
            return [_name(cls), hashlib.sha256(text.encode()).hexdigest()]
        if isinstance(value, torch.Generator):  # how far it is, its use says
            return [_name(cls), value.initial_seed()]
        if isinstance(value, (random.Random, np.random.RandomState)) and "seed" in uses:  # anew at each use
            return [_name(cls)]
        if isinstance(value, np.random.Generator):
            return [_name(cls), of(value.bit_generator.seed_seq)]
        if any(each.__module__ == "evaluate.module" for each in cls.__mro__) and hasattr(value, "config_name"):
            return [of(cls), value.config_name]  # what else it holds is of its last use
        if isinstance(value, functools._lru_cache_wrapper):
            return ["cached", of(value.__wrapped__)]
        untold: tuple[str, ...] = functools.WRAPPER_ASSIGNMENTS  # which a decorator's object has of what it wraps
        if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
            untold += (*UNTOLD, *(("_vocab", "_merges") if hasattr(value, "backend_tokenizer") else ()))
        elif cls.__module__.startswith("transformers.") and callable(getattr(value, "to_dict", None)):
            data = value.to_dict()
            return [of(cls), of({key: data[key] for key in data if key not in UNTOLD})]
        try:
            reduce = copyreg.dispatch_table.get(cls)
            made = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"nothing tells one {_name(cls)} from another: {error}") from error
        if isinstance(made, str):
            return [_name(cls), made]
        _, args, state, items, pairs = (*made, *[None] * 5)[:5]
        if isinstance(state, dict):
            own = not is_installed(cls.__module__)  # of others, methods that are called may well set what counts
            bound, altered, named = changed_in_use(cls, frozenset(uses if own else ()))
            remembered = {name for name in state if isinstance(getattr(cls, name, None), functools.cached_property)}
            self.use(state, named)
            state = self.without_state(state, {*bound, *untold, *remembered}, altered) or None  # as of one not used yet
        return [of(cls), of(tuple(args)), of(state), of(list(items or ())), of(list(pairs or ()))]


def _name(value: Any) -> str:
    """With the module only where it is an installed one: a script's is another where it is imported."""
    return f"{value.__module__}.{value.__qualname__}" if is_installed(value.__module__) else value.__qualname__
