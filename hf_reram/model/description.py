"""What a Python value is made of, as a fingerprint that is the same in another process."""

import argparse
import copyreg
import dataclasses
import enum
import functools
import hashlib
import io
import json
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nn.tensors import whole
from .code import (
    Chains,
    around_of,
    globals_of,
    imports_of,
    is_generated,
    module_of,
    of_libraries,
    own_functions,
    reads,
    reads_any,
    set_by,
    taken_whole,
    variables_around,
)
from .handed import handed_on
from .installed import OWN, is_installed
from .source import set_since, source_of

BUILT_IN = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc),
    *(types.MemberDescriptorType, types.GetSetDescriptorType, types.ClassMethodDescriptorType),
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
    ("torch.amp.autocast_mode", "autocast"): ("prev", "prev_cache_enabled", "prev_fastdtype"),
    ("sentence_transformers.base.data_collator", "BaseDataCollator"): ("_warned_columns",),
    ("transformers.pipelines.base", "Pipeline"): ("call_count",),
    ("accelerate.data_loader", "DataLoaderStateMixin"): (
        *("iteration", "end_of_dataloader", "remainder", "gradient_state"),
    ),
}
SETTLED = (bool, int, float, str, type(None), types.FunctionType, types.MethodType, nn.Module)
# Of a Trainer's arguments what no evaluation depends on: how it trains, logs, saves and spreads over devices.
OF_TRAINING = re.compile(
    r"_|output_dir$|per_device_train|num_train_epochs$|max_steps$|learning_rate$|lr_|warmup_|optim|weight_decay$|adam_"
    r"|max_grad_norm$|average_tokens|gradient_|activation_checkpointing|torch_compile|torch_empty|neftune|auto_find"
    r"|logging_|log_|include_num_input|disable_tqdm$|report_to$|run_name$|project$|trackio_|save_|push_to_hub$|hub_"
    r"|eval_(strategy|steps|delay|on_start|use_gather_object|accumulation_steps)$|load_best_model|metric_for_best_model$"
    r"|greater_is_better$|ignore_data_skip$|restore_callback|resume_from|do_(train|eval|predict)$|enable_jit_checkpoint$"
    r"|use_cpu$|local_rank$|distributed_state$|accelerator_config$|parallelism_config$|ddp_|fsdp|deepspeed|debug$"
    r"|skip_memory_metrics$|dataloader_(num_workers|pin_memory|persistent|prefetch|multiprocessing|in_order)"
)
CACHES = ("dispatch_cache", "cache_token")  # of functools.singledispatch


class Description:
    """JSON values that other values have only if they are the same: numbers and texts as they are, all else as a
    SHA-256 of what it is made of. Functions are their code, with what they close over, and all that they name, by what
    they read of it: of a script's own modules and classes, of namespaces and of dataclasses' objects the attributes
    that they take, and modules that they take whole by their source. Of other objects the class and what they pickle
    count, or what their method ``told_by`` says, also what use has changed; but not what some libraries' objects hold
    of their last use, and how far random generators are. Of a Trainer, and of its arguments beside those that
    evaluations depend on, the attributes count that any of the code reads. Of installed packages only names count.

    Attributes:
        named: what tells parts of the value that was told last, such as an object's attributes or a function's
            variables and globals, by their names. functions: of a script's, that were looked at.
    """

    as_json = False  # whether containers that JSON keeps alike are the same

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any]] = {}  # holds on to the values, whose ids others would get
        self.above: dict[int, int] = {}
        self.named: dict[str, Any] = {}
        self.functions: dict[types.FunctionType, None] = {}
        # Objects, by their ids, of whose attributes only those count that code reads, each with the name that it was
        # first met by; what tells these attributes, and what tells other parts.
        self.arguments: dict[int, tuple[str, Any, Mapping[str, Any]]] = {}
        self.arguments_told: dict[tuple[int, str], tuple[str, Any]] = {}
        self.label, self.read = "", dict[str, Any]()

    def whole(self, value: Any) -> Any:
        """What tells the value.

        Raises:
            ValueError: parts of it cannot be told, as locks or open files.
        """
        self.named, self.label = {}, ""
        try:
            told = self.of(value)
            named, read = self.named, self.arguments_read()
        except ValueError:
            raise
        except RecursionError as error:
            raise ValueError(f"{type(value).__name__} cannot be read: its parts lie too deep in one another") from error
        except Exception as error:  # whatever its parts raise
            raise ValueError(f"{type(value).__name__} cannot be read: {type(error).__name__}: {error}") from error
        self.named = {**named, **self.read, **read}
        return _digest([told, *read.values()]) if read else told

    def arguments_read(self) -> dict[str, Any]:
        """What tells those attributes of objects of arguments that code reads, by their names."""
        new: list[Any] = [()]
        while new:  # they may name more code, and that more of them
            codes = self.codes_read()
            names, any_ = {name for code in codes for name in reads(code)}, any(map(reads_any, codes))
            whole = {name for code in codes for name in taken_whole(code)}
            new = []
            for at, (label, value, attributes) in enumerate(self.arguments.values()):
                every = counted_of(value, attributes) if label.rpartition(".")[2] in whole else {}
                new += [
                    (at, name, _path(label, name), attributes[name])
                    for name in sorted(attributes)
                    if (at, name) not in self.arguments_told and (any_ or name in names or name in every)
                ]
            for at, name, path, part in new:
                self.arguments_told[at, name] = path, self.held(path, part)
        return {path: part for _, (path, part) in sorted(self.arguments_told.items())}

    def codes_read(self) -> list[types.CodeType]:
        """The code of a script's functions that were looked at."""
        return [function.__code__ for function in self.functions if not is_generated(function)]

    def of(self, value: Any) -> Any:
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            value = value.item()
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
            return self.plain(value)
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.above:
            return ["around", len(self.above) - self.above[id(value)]]
        self.above[id(value)] = len(self.above)
        try:
            parts = self.parts(value)
        finally:
            del self.above[id(value)]
        digest = _digest(parts)
        self.known[id(value)] = (value, digest)
        self.named = {name: part for each in parts if isinstance(each, dict) for name, part in each.items()}
        return digest

    def plain(self, value: Any) -> Any:
        return value

    def held(self, name: str, value: Any) -> Any:
        """What tells a value that code has under a name."""
        return self.of(value)

    def parts(self, value: Any) -> list:
        """What a value is made of, as JSON values."""
        of = self.of
        if isinstance(value, (torch.dtype, torch.device, np.dtype, complex, range, slice, PurePath, type(...))):
            return [str(value)]
        if isinstance(value, enum.Enum):
            return ["enum", of(type(value)), of(value.value)]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return ["bytes", hashlib.sha256(value).hexdigest()]
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return ["array", *self.array(value)]
        if type(value) in (list, tuple):
            kind = "list" if self.as_json else type(value).__name__
            if len(value) > 16 and {*map(type, value)} <= {int, float, bool}:  # data, in which each would take long
                return [kind, _digest(list(value))]
            return [kind, *map(of, value)]
        if isinstance(value, (set, frozenset)):  # which has them in another order in another process
            return ["set", *sorted(json.dumps(of(item)) for item in sorted(value, key=_order))]
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            if self.as_json:
                return ["dict", *sorted(([str(of(key)), of(item)] for key, item in value.items()), key=json.dumps)]
            return ["dict", *([of(key), of(item)] for key, item in value.items())]
        if isinstance(value, types.FunctionType):
            compiled = getattr(value, "_torchdynamo_orig_callable", None)  # what torch.compile made it of
            return self.function(value) if compiled is None else ["compiled", of(compiled)]
        if isinstance(value, types.MethodType):
            return ["method", {"function": of(value.__func__), "self": of(value.__self__)}]
        if isinstance(value, functools.partial):
            return ["partial", {"func": of(value.func), "args": of(value.args), "keywords": of(value.keywords)}]
        if isinstance(value, (staticmethod, classmethod)):
            return [of(value.__func__)]
        if isinstance(value, property):
            return ["property", of(value.fget), of(value.fset)]
        if isinstance(value, functools.cached_property):
            return ["property", of(value.func)]
        if isinstance(value, types.CodeType):
            return self.code(value)
        if isinstance(value, types.ModuleType) and not is_installed(value.__name__):
            return ["source", *self.source([value.__name__])]
        if isinstance(value, (types.ModuleType, *BUILT_IN)):
            owner = getattr(value, "__self__", None)
            return ["named", self.name(value), *([] if owner is None or _is_module(owner) else [of(owner)])]
        if isinstance(value, type):
            return [self.name(value), *(of(part) for base in value.__mro__ for part in self.body(base))]
        return self.object(value)

    def name(self, value: Any) -> str:
        """With the module only where it is an installed one: a script's is another where it is imported."""
        if isinstance(value, types.ModuleType):
            return value.__name__
        name, module = getattr(value, "__qualname__", None) or value.__name__, getattr(value, "__module__", None)
        return name if module is not None and not is_installed(module) else f"{module}.{name}"

    # Numbers

    def tensor(self, value: torch.Tensor) -> list:
        if value.is_meta:
            return self.untold(value, "it is on the meta device")
        values = whole(value.detach()).cpu()
        values = (values if values.layout == torch.strided else values.to_dense()).contiguous()
        data = values.reshape(-1).view(torch.uint8).numpy().data if values.numel() else b""
        return [str(values.dtype), list(values.shape), hashlib.sha256(data).hexdigest()]

    def array(self, value: np.ndarray) -> list:
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]

    # Code

    def function(self, value: types.FunctionType) -> list:
        of, code, around = self.of, value.__code__, variables_around(value)
        defaults = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
        parts = [self.name(value), {name: of(part) for name, part in defaults.items() if part is not None}]
        if is_installed(module_of(value)):  # a decorator may have given it another __module__
            left_out = CACHES if module_of(value) == functools.__name__ else ()
            return [*parts, {name: of(part) for name, part in around.items() if name not in left_out}]
        self.functions[value] = None
        known = {name: part for name, part in value.__globals__.items() if name[:2] != "__"}
        used = {
            **self.variables(value, around, around_of(code)),
            **self.variables(value, known, globals_of(code)),
        }
        imported = self.source(imports_of(code, value.__globals__.get("__package__") or ""))
        own = {name: part for name, part in vars(value).items() if name != "__wrapped__"}
        more = [self.held(name, part) for name, part in (("imports", imported), ("attributes", own)) if part]
        return [*parts, of(code), used, *more]

    def code(self, value: types.CodeType) -> list:
        return ["code", value.co_code.hex(), list(value.co_names), *map(self.of, value.co_consts)]

    def variables(self, function: types.FunctionType, known: Mapping[str, Any], chains: Chains) -> dict[str, Any]:
        """What tells the variables that a function's code reads, by their names and those of the attributes that it
        takes."""
        found, told = dict[str, Any](), dict[str, Any]()
        for name in sorted(known.keys() & chains.keys()):
            for chain in sorted(chains[name]):
                part, at = known[name], 0
                while at < len(chain) and chain[at] in (inside := parts_inside(part)):
                    part, at = inside[chain[at]], at + 1
                path = ".".join((name, *chain[:at]))
                if type(part) is argparse.Namespace and not at and not handed_on(function, name):
                    self.label = path  # it gets to a script's functions alone, of which all is known
                    told[path] = self.read_of(part, vars(part), {})
                    continue
                # By its parts where it is taken whole, to say which differs.
                counted = counted_of(part, vars(part) if type(part) is argparse.Namespace else {})
                found |= {f"{path}.{each}": inside for each, inside in counted.items()} or {path: part}
        for name, part in found.items():
            self.label = name
            told[name] = self.held(name, part)
        return told

    def source(self, names: Iterable[str]) -> list:
        """Of modules of a script's own their files, and what has been set in them since."""
        return [
            [name, digest, *([self.of(changed)] if (changed := set_since(name)) else [])]
            for name, digest in source_of(names)
        ]

    def body(self, cls: type) -> Iterator[Any]:
        """What makes instances of a class do what they do: all of a script's own, and what a script has put on an
        installed package's."""
        installed = is_installed(cls.__module__)
        for name, part in sorted(vars(cls).items()):
            special = name.startswith("__") and name.endswith("__")  # of these, what they do
            does = callable(part) or isinstance(part, (staticmethod, classmethod))
            if own_functions(part) if installed else name != "_abc_impl" and (does or not special):
                yield [name, part]

    # Objects

    def object(self, value: Any) -> list:
        of = self.of
        cls: Any = type(value)
        kinds = kinds_of(value)
        if callable(getattr(cls, "told_by", None)):
            return [of(cls), of(value.told_by())]
        if isinstance(value, nn.Module):
            return self.module(value)
        if "TrainingArguments" in kinds:
            return [of(cls), {name: of(part) for name, part in counted_of(value, {}).items()}]
        if _is_of_tokenizers(cls):
            return self.tokenizer(value)
        if isinstance(value, torch.Generator):  # how far it is, its use says
            return [self.name(cls), value.initial_seed()]
        if isinstance(value, np.random.Generator):
            return [self.name(cls), of(value.bit_generator.seed_seq)]
        if isinstance(value, functools._lru_cache_wrapper):
            return ["cached", of(value.__wrapped__)]
        if isinstance(value, io.IOBase) and not value.closed and not value.readable():
            return ["written to"]
        left_out: tuple[str, ...] = functools.WRAPPER_ASSIGNMENTS  # which a decorator's object has of what it wraps
        left_out += tuple(
            name for each in cls.__mro__ for name in OF_LAST_USE.get((each.__module__, each.__name__), ())
        )
        if "DataCollatorForLanguageModeling" in kinds and value.seed is not None:
            made = [value.get_generator(value.seed, kind) for kind in ("pt", "np")]  # as its first use does
            left_out += ("generator", "_generator_pid") if of(value.generator) in (None, *map(of, made)) else ()
        if not kinds.isdisjoint(("PreTrainedTokenizerBase", "ProcessorMixin")):
            inner = getattr(value, "backend_tokenizer", None)
            left_out += (*UNTOLD, *(() if inner is None else ("_vocab", "_merges")))
            if _is_of_tokenizers(type(inner)):  # which it tells how to cut and pad in each call
                return [*self.pickled(value, (*left_out, "_tokenizer")), self.tokenizer(inner, cuts=False)]
        elif kinds and callable(getattr(cls, "to_dict", None)):  # a configuration, an image processor or the like
            return [of(cls), {name: of(part) for name, part in self.settings(value).items()}]
        return self.pickled(value, left_out)

    def tokenizer(self, value: Any, cuts: bool = True) -> list:
        """What tells one of the package tokenizers; ``cuts``: also how it cuts and pads."""
        said = json.loads(value.to_str())
        said |= {} if cuts else {"truncation": None, "padding": None}
        text = json.dumps(said, sort_keys=True)
        return [self.name(type(value)), hashlib.sha256(text.encode()).hexdigest()]

    def pickled(self, value: Any, left_out: tuple[str, ...] = ()) -> list:
        """What an object of any class pickles, without some of its attributes."""
        of, cls = self.of, type(value)
        try:
            reduce: Any = copyreg.dispatch_table.get(cls)
            reduced: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # whatever its parts raise
            return self.untold(value, str(error))
        if isinstance(reduced, str):
            return [self.name(cls), reduced]
        _, args, state, items, pairs = (*reduced, *[None] * 5)[:5]
        if isinstance(state, dict):
            state = {name: of(part) for name, part in state.items() if name not in left_out}
        else:
            state = of(state)
        return [of(cls), of(tuple(args)), state or None, of(list(items or ())), of(list(pairs or ()))]

    def read_of(self, value: Any, attributes: Mapping[str, Any], parts: Mapping[str, Any]) -> list:
        """Of an object its class, other parts, and those attributes that code reads, which is known when all is."""
        label, told = self.label, {}
        self.arguments.setdefault(id(value), (label, value, attributes))
        for name, part in {"class": type(value), **parts}.items():
            self.label = path = _path(label, name)
            told[name] = self.held(path, part)
            self.read[path] = told[name]
        return ["read", [*self.arguments].index(id(value)), told]

    def settings(self, value: Any) -> dict[str, Any]:
        """What counts of a configuration of transformers."""
        return {name: part for name, part in value.to_dict().items() if name not in UNTOLD}

    def module(self, value: nn.Module) -> list:
        """What tells a module of torch."""
        raise NotImplementedError

    def untold(self, value: Any, why: str) -> list:
        """What stands for a value that nothing tells from others.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"nothing tells one {self.name(type(value))} from another: {why}")


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _path(label: str, name: str) -> str:
    return f"{label}.{name}" if label else name


def _order(value: Any) -> str:
    """Of a set's items, whatever they hash to: those that name one another are told from where one is met first."""
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', None) or repr(value)}"


def _is_of_tokenizers(cls: type) -> bool:
    return cls.__module__ == "tokenizers" and cls.__name__ == "Tokenizer"


def _is_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType)


def is_own(value: Any) -> bool:
    """Whether an object is of a class of a script's own that is nothing of an installed package."""
    counts = [not is_installed(cls.__module__) for cls in type(value).__mro__]
    return counts[0] and all(
        one or cls.__module__ in ("builtins", "abc", "typing") for one, cls in zip(counts, type(value).__mro__)
    )


def counted_of(value: Any, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """By name what counts of a Trainer's arguments that are taken whole; the ``attributes`` of others."""
    if "TrainingArguments" not in kinds_of(value):
        return attributes
    own, parts = arguments_of(value)
    read = {name: part for name, part in own.items() if not OF_TRAINING.match(name)}
    return {"class": type(value), **read, **parts}


def arguments_of(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a Trainer's arguments what counts where code reads it, as what a script has added, and what does anyhow."""
    added = added_attributes(value, "transformers")
    known = {name: part for name, part in vars(value).items() if name not in added}
    own, parts = parts_added(value, {name: part for name, part in known.items() if not OF_TRAINING.match(name)})
    return own | {name: part for name, part in known.items() if name not in parts}, parts


def parts_inside(value: Any) -> Mapping[str, Any]:
    """What code may take of a value without reading anything else of it, by name: of a script's own modules, of
    ``sys`` its arguments, of namespaces, dataclasses' objects, transformers' arguments among them, and what classes
    hold but methods. Nothing of others."""
    if isinstance(value, types.ModuleType):
        return {"argv": sys.argv} if value is sys else {} if is_installed(value.__name__) else vars(value)
    if isinstance(value, type):
        own = {} if is_installed(value.__module__) else vars(value)
        return {name: part for name, part in own.items() if not callable(part) and not hasattr(part, "__get__")}
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)) or "TrainingArguments" in kinds_of(value):
        return vars(value)
    return vars(value) if dataclasses.is_dataclass(value) and is_own(value) and hasattr(value, "__dict__") else {}


def kinds_of(value: Any) -> set[str]:
    """Names of those classes that an object is of that are of transformers."""
    return {cls.__name__ for cls in type(value).__mro__ if cls.__module__.startswith("transformers.")}


def added_attributes(value: Any, library: str, runs: bool = False) -> dict[str, Any]:
    """Attributes of an object that no method of a library's classes, of those that it is of, sets on it: what a
    subclass has beside what the library gives it, or a script has set.

    Args:
        library: a package. runs: whether the object keeps records of its running; of what the classes of further
            installed packages set, only numbers, texts, functions and modules then count.
    """
    known: set[str] = set()
    others: set[str] = set()
    for cls in type(value).__mro__:
        if is_installed(cls.__module__):
            own = cls.__module__.partition(".")[0] in (library, OWN)
            (known if own else others).update(set_by(cls))
    return {
        name: part
        for name, part in vars(value).items()
        if name not in known
        and not name.startswith("__")
        and (name not in others or (not name.startswith("_") and (not runs or isinstance(part, SETTLED))))
    }


def parts_added(value: Any, parts: dict[str, Any], runs: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a script has added to an object of transformers (:func:`added_attributes`), which its code reads; and parts
    of it, and beside these what further libraries have, whose code does."""
    added = added_attributes(value, "transformers", runs)
    cls: Any = type(value)
    others = of_libraries(cls)
    own = {name: part for name, part in added.items() if name not in parts and name not in others}
    return own, parts | {name: part for name, part in added.items() if name in others}
