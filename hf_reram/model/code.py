"""What Python code reads, sets and imports, by its bytecode."""

import dis
import functools
import importlib.util
import types
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, takewhile
from typing import Any

from .installed import is_installed

# Where what wraps a function has it.
INNER: Any = (
    (types.FunctionType, "__wrapped__"),
    ((types.MethodType, staticmethod, classmethod), "__func__"),
    ((functools.partial, functools.cached_property), "func"),
)
CALLED = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod)
SKIPPED = ("CACHE", "PRECALL", "EXTENDED_ARG")  # which do nothing by themselves
GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
AROUND = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
INSIDE = (*ATTRIBUTES, "STORE_ATTR")
# What may read attributes that code does not name.
READ_ANY = ("__dict__", "attrgetter", "methodcaller", "_get_kwargs", "_get_args")
FUNCTIONS = ("vars", "eval", "exec")  # no methods of these names
MAKING = ("__init__", "__post_init__", "_init_weights", "reset_parameters")  # which nothing calls later

Chains = dict[str, set[tuple[str, ...]]]


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code and what is defined in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_of(part)


def steps_of(code: types.CodeType) -> list[dis.Instruction]:
    """What code does, in its order, without what is defined in it."""
    return [step for step in dis.get_instructions(code) if step.opname not in SKIPPED]


# Functions


def functions_in(value: Any) -> list[types.FunctionType]:
    """The functions that a method, property or the like is of, without what decorates them."""
    if isinstance(value, property):
        return [inner for part in (value.fget, value.fset) for inner in functions_in(part)]
    inner = value
    while inner is not None:
        value = inner
        inner = next((getattr(value, name, None) for kind, name in INNER if isinstance(value, kind)), None)
    return [value] if isinstance(value, types.FunctionType) else []


def own_functions(value: Any) -> list[types.FunctionType]:
    """A script's functions in a function, method, property or the like, also where libraries' functions wrap them."""
    found: dict[int, types.FunctionType] = {}
    todo, seen = [value], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType) and not is_installed(module_of(value)):
            found[id(value)] = value
        elif isinstance(value, types.FunctionType):
            todo += [part for part in variables_around(value).values() if isinstance(part, CALLED)]
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, property):
            todo += [value.fget, value.fset]
        elif not isinstance(value, type):
            inner = next((getattr(value, name) for kind, name in INNER[1:] if isinstance(value, kind)), None)
            todo.append(_attributes(value).get("__wrapped__") if inner is None else inner)
    return list(found.values())


def _attributes(value: Any) -> dict[str, Any]:
    """As ``vars``, whatever a class does where it is asked for an attribute."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


def module_of(function: types.FunctionType) -> str | None:
    """The module that a function was written in, whatever a decorator has it say."""
    return function.__globals__.get("__name__")


def is_generated(function: types.FunctionType) -> bool:
    """Whether ``dataclass`` has written it, which reads all fields to compare and to show them."""
    return (
        function.__code__.co_filename == "<string>"
        and function.__name__[:2] == "__"
        and function.__name__ != "__call__"
    )


def variables_around(function: types.FunctionType) -> dict[str, Any]:
    """The variables that a function closes over, without those that are not set yet."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


# What code reads


@cache
def globals_of(code: types.CodeType) -> Chains:
    """Names of the globals that code reads, each with the attributes that it takes of them, as ("path", "join") in
    ``os.path.join``; () where it takes the object itself."""
    return _chains(code, GLOBALS)


@cache
def around_of(code: types.CodeType) -> Chains:
    """As :func:`globals_of`, of the variables that it closes over."""
    found = _chains(code, AROUND)
    return {name: found[name] for name in code.co_freevars if name in found}


def _chains(code: types.CodeType, loads: tuple[str, ...]) -> Chains:
    found: Chains = {}
    for part in codes_of(code):
        name: str | None = None
        chain: list[str] = []
        for step in steps_of(part):
            if name is not None and step.opname in ATTRIBUTES:
                chain.append(step.argval)
                continue
            if name is not None and not chain and step.opname == "COPY":  # as in `module.count += 1`
                continue
            if name is not None and (chain or step.opname != "STORE_ATTR"):
                found.setdefault(name, set()).add(tuple(chain))
            name, chain = (step.argval, []) if step.opname in loads else (None, [])
    return found


@cache
def reads(code: types.CodeType) -> frozenset[str]:
    """Names of attributes that code may read, of whichever object, but to set them anew as in ``self.count += 1``."""
    found = set()
    for part in codes_of(code):
        for before, step in pairwise(steps_of(part)):
            if step.opname in (*ATTRIBUTES, "LOAD_SUPER_ATTR") and before.opname != "COPY":
                found.add(step.argval)
        found |= _texts(part)  # as in getattr(self, "count")
    return frozenset(found)


@cache
def taken_whole(code: types.CodeType) -> frozenset[str]:
    """Names of attributes that code takes for more than to take or set attributes of them, also under a name of its
    own: it may hand them to other code. Not where an object is made, since it holds what comes of them."""
    if code.co_name in MAKING:
        return frozenset()
    found = set()
    for part in codes_of(code):
        pairs = list(pairwise(steps_of(part)))
        for step, after in pairs:
            if step.opname not in ATTRIBUTES or after.opname in INSIDE:
                continue
            named = after.argval if after.opname == "STORE_FAST" else None
            loads = [(one, two) for one, two in pairs if "LOAD_FAST" in one.opname and named in _locals(one)]
            if named is None or any(one.argval != named or two.opname not in INSIDE for one, two in loads):
                found.add(step.argval)
    return frozenset(found)


def _locals(step: dis.Instruction) -> tuple[str, ...]:
    """The local variables that a step loads; of some Pythons several at once."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def names_in(code: types.CodeType) -> set[str]:
    """All names of globals and attributes in code."""
    return {name for part in codes_of(code) for name in part.co_names}


@cache
def reads_any(code: types.CodeType) -> bool:
    """Whether code may read attributes that it does not name: by what :data:`READ_ANY` and :data:`FUNCTIONS` name, a
    ``match``, or a ``getattr`` by another name than a text that stands there."""
    if not names_in(code).isdisjoint(READ_ANY) or not globals_of(code).keys().isdisjoint(FUNCTIONS):
        return True
    for part in codes_of(code):
        steps = steps_of(part)
        for at, step in enumerate(steps):
            if step.opname == "MATCH_CLASS":
                return True
            if step.opname in GLOBALS and step.argval == "getattr" and not _is_named(steps[at + 1 :]):
                return True
    return False


def _is_named(steps: list[dis.Instruction]) -> bool:
    """Whether the second argument of the call that these begin with is a text that stands there."""
    loads = list(takewhile(lambda each: "CALL" not in each.opname, steps))
    given = steps[len(loads)].argval if len(loads) < len(steps) else 0
    operands = [each for each in loads if each.opname not in (*ATTRIBUTES, "PUSH_NULL")]
    if given not in (2, 3) or len(operands) != given:  # calls, conditions and the like inside
        return False
    return operands[1].opname == "LOAD_CONST" and isinstance(operands[1].argval, str)


def _texts(code: types.CodeType) -> set[str]:
    """Texts in code, also in tuples; not only names, as an argparse positional's has hyphens."""
    every = (part if isinstance(part, tuple) else (part,) for part in code.co_consts)
    return {part for each in every for part in each if isinstance(part, str)}


def imports_of(code: types.CodeType, package: str) -> set[str]:
    """Full names of the modules that code imports, and may import, where ``from a import b`` may take a module b.

    Args:
        package: that relative imports start from, "" where there is none.
    """
    found: set[str] = set()
    for part in codes_of(code):
        if dis.opmap["IMPORT_NAME"] not in part.co_code[::2]:  # which most of it has none of, and steps are slow
            continue
        steps = steps_of(part)
        for at, step in enumerate(steps):
            if step.opname != "IMPORT_NAME":
                continue
            level, names = (before.argval for before in steps[at - 2 : at])
            try:
                name = importlib.util.resolve_name("." * level + step.argval, package or None) if level else step.argval
            except ImportError:  # beyond the top, as it would fail itself
                continue
            found |= {name, *(f"{name}.{part}" for part in names or () if part != "*")}
    return found


# What code sets


@cache
def sets(code: types.CodeType) -> frozenset[str]:
    """Names of attributes, and of buffers, that code sets on its first argument."""
    found, steps = set(), steps_of(code)
    for at, step in enumerate(steps):
        added = step.opname == "LOAD_ATTR" and steps[at - 1].opname == "COPY"  # as in `self.count += 1`
        before = steps[at - 2 if added else at - 1]
        last = before.argval[-1:] if isinstance(before.argval, tuple) else (before.argval,)
        if (added or step.opname == "STORE_ATTR") and "LOAD_" in before.opname and last == code.co_varnames[:1]:
            found.add(step.argval)
    return frozenset(found | (_texts(code) if "register_buffer" in code.co_names else set()))


@cache
def set_by(cls: type) -> frozenset[str]:
    """Names of attributes that a class's methods set on their object, its fields and cached properties."""
    found = {*getattr(cls, "__dataclass_fields__", ()), *vars(cls).get("__annotations__", ())}
    for name, part in vars(cls).items():
        if isinstance(part, functools.cached_property):
            found.add(name)
        found.update(*(sets(function.__code__) for function in functions_in(part)))
    return frozenset(found)


@cache
def of_libraries(cls: Any) -> frozenset[str]:
    """Names of attributes that those parents of a class have or set that are of installed packages."""
    parents = [parent for parent in cls.__mro__ if is_installed(parent.__module__)]
    return frozenset(name for parent in parents for name in {*set_by(parent), *vars(parent)})
