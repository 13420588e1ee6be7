"""What an evaluation is measured on and with, as a fingerprint that is the same in another process."""

import copyreg
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

from ..model.attributes import OF_LIBRARIES
from ..model.digest import settings_of, weights_digest
from .code import added_attributes, globals_of, imports_of, is_installed, set_since, source_of
from .data_files import content_under, files_of, row_content

BUILT_IN = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc),
    *(types.MemberDescriptorType, types.GetSetDescriptorType),
)
# Of what transformers has: where it is from, how it is stored and called, and what its class says.
UNTOLD = (
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "vocab_file", "merges_file"),
    *("init_inputs", "init_kwargs", "files_loaded", "verbose", "deprecation_warnings", "_in_target_context_manager"),
    *("_processor_class", "processor_class", "backend"),
)
# What other libraries' objects hold of their last use and no figure depends on, by the classes' modules and names.
OF_LAST_USE = {
    ("transformers.tokenization_python", "PythonBackend"): ("cache",),
    ("torch.utils.data.dataloader", "DataLoader"): ("_iterator",),
    ("sentence_transformers.base.data_collator", "BaseDataCollator"): ("_warned_columns",),
}


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
    return key_of(name, value, files)[name]


def key_of(name: str, value: Any, files: bool = False) -> dict[str, Any]:
    """As :func:`part_of`, under the name, and beside it what tells its own parts from others, such as an object's
    attributes or a function's variables and globals, each under its name after the other and a dot.

    Raises:
        ValueError: it cannot be told; names it.
    """
    description = _Description(files)
    try:
        return {name: description.whole(value), **{f"{name}.{part}": told for part, told in description.named.items()}}
    except ValueError as error:
        raise ValueError(
            f"the {name} cannot be told from another one: say with key=... what is evaluated: {error}"
        ) from error


def described(value: Any, files: bool = False) -> Any:
    """A JSON value that another value has only if it is the same: numbers and texts as they are, all else as a SHA-256
    of what it is made of. Functions are their code, with what they close over, and all that they name, modules of a
    script's own by what is read of them; models their settings and weights; other objects their class and what they
    pickle, or what their method ``told_by`` says. All that they hold counts, also what use has changed; but for what
    some libraries' objects hold of their last use, and how far random generators are. Of installed packages only names
    count.

    Args:
        files: texts and paths that name a file or folder stand for what is in it.

    Raises:
        ValueError: parts of it cannot be told, as locks or open files.
    """
    return _Description(files).whole(value)


class _Description:
    def __init__(self, files: bool) -> None:
        self.files = files
        self.read: dict[str | PurePath, str | None] = {}  # what is in files, by their path
        self.known: dict[int, tuple[Any, str]] = {}  # holds on to the values, whose ids others would get
        self.above: dict[int, int] = {}
        self.named: dict[str, Any] = {}  # parts by their names, of what was told last

    def whole(self, value: Any) -> Any:
        """
        Raises:
            ValueError: parts of it cannot be told.
        """
        try:
            return self.of(value)
        except ValueError:
            raise
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"{type(value).__name__} cannot be read: {type(error).__name__}: {error}") from error

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
        self.named = {name: part for each in parts if isinstance(each, dict) for name, part in each.items()}
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
        closed = zip(code.co_freevars, value.__closure__ or ())
        inside = {name: of(cell.cell_contents) for name, cell in closed if cell != types.CellType()}
        parts = [_name(value), of(value.__defaults__), of(value.__kwdefaults__), inside]
        if is_installed(value.__globals__.get("__name__")):  # a decorator may have given it another __module__
            return parts
        used = {}
        for name, chains in sorted(globals_of(code).items()):
            if name in value.__globals__ and name[:2] != "__":
                item = value.__globals__[name]
                module = isinstance(item, types.ModuleType) and not is_installed(item.__name__)
                used[name] = self.of(self.read_of(item, chains)) if module else of(item)
        imported = self.source(imports_of(code, value.__globals__.get("__package__") or ""))
        own = {name: part for name, part in vars(value).items() if name != "__wrapped__"}
        return [*parts, of(code), used, *([imported] if imported else []), *([of(own)] if own else [])]

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
        for name, part in sorted(vars(cls).items()):
            special = name.startswith("__") and name.endswith("__")  # of these, what they do
            if name != "_abc_impl" and (not special or callable(part) or isinstance(part, (staticmethod, classmethod))):
                yield [name, part]

    def object(self, value: Any) -> list:
        from datasets import Dataset, IterableDataset
        from tokenizers import Tokenizer
        from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, ProcessorMixin

        of = self.of
        cls: Any = type(value)
        if callable(getattr(cls, "told_by", None)):
            return [of(cls), of(value.told_by())]
        if isinstance(value, (Dataset, IterableDataset)):
            return ["data", content_of(value)]
        if isinstance(value, torch.utils.data.Dataset) and not self.files:
            return ["data", described(value, files=True)]
        if isinstance(value, torch.nn.Module):  # as a collator has it: what it computes, not what it remembers
            classes = sorted({of(type(module)) for module in value.modules()})
            own = {
                name: {each: of(part) for each, part in vars(module).items() if each not in OF_LIBRARIES}
                for name, module in value.named_modules()
                if not is_installed(type(module).__module__)
            }
            return [of(cls), [settings_of(value), weights_digest(value), own], classes]
        if isinstance(value, Tokenizer):  # without how it cut and padded last
            text = json.dumps({**json.loads(value.to_str()), "truncation": None, "padding": None}, sort_keys=True)
            return [_name(cls), hashlib.sha256(text.encode()).hexdigest()]
        if isinstance(value, torch.Generator):  # how far it is, its use says
            return [_name(cls), value.initial_seed()]
        if isinstance(value, np.random.Generator):
            return [_name(cls), of(value.bit_generator.seed_seq)]
        if any(each.__module__ == "evaluate.module" for each in cls.__mro__) and hasattr(value, "config_name"):
            # What the library sets there is of its last use.
            return [of(cls), value.config_name, of(added_attributes(value, "evaluate"))]
        if isinstance(value, functools._lru_cache_wrapper):
            return ["cached", of(value.__wrapped__)]
        untold: tuple[str, ...] = functools.WRAPPER_ASSIGNMENTS  # which a decorator's object has of what it wraps
        untold += tuple(name for each in cls.__mro__ for name in OF_LAST_USE.get((each.__module__, each.__name__), ()))
        if isinstance(value, DataCollatorForLanguageModeling) and value.seed is not None:
            made = [value.get_generator(value.seed, kind) for kind in ("pt", "np")]  # as its first use does
            untold += ("generator", "_generator_pid") if of(value.generator) in (None, *map(of, made)) else ()
        if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
            untold += (*UNTOLD, *(("_vocab", "_merges") if hasattr(value, "backend_tokenizer") else ()))
        elif cls.__module__.startswith("transformers.") and callable(getattr(value, "to_dict", None)):
            data = value.to_dict()
            return [of(cls), of({key: data[key] for key in data if key not in UNTOLD})]
        try:
            reduce = copyreg.dispatch_table.get(cls)
            reduced = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"nothing tells one {_name(cls)} from another: {error}") from error
        if isinstance(reduced, str):
            return [_name(cls), reduced]
        _, args, state, items, pairs = (*reduced, *[None] * 5)[:5]
        if isinstance(state, dict):
            state = {name: of(part) for name, part in state.items() if name not in untold}
        else:
            state = of(state)
        return [of(cls), of(tuple(args)), state or None, of(list(items or ())), of(list(pairs or ()))]


def _name(value: Any) -> str:
    """With the module only where it is an installed one: a script's is another where it is imported."""
    return f"{value.__module__}.{value.__qualname__}" if is_installed(value.__module__) else value.__qualname__
