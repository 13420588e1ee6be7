"""Whether a script's function hands a variable on, whole, to code that is none of a script's, by its source."""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from .code import module_of, variables_around
from .installed import is_installed

BY_NAME = ("getattr", "hasattr", "isinstance", "vars")  # of which the attributes that they read are known otherwise


def handed_on(function: types.FunctionType, name: str, seen: frozenset = frozenset()) -> bool:
    """Whether what a function has under a name may get to code that is none of a script's, or to where it is not
    followed: unless each use of it takes an attribute of it, or is an argument of a script's function of which the
    same holds. True also where there is no source."""
    seen |= {(function, name)}
    return any(
        callee is None or ((callee, its) not in seen and handed_on(callee, its, seen))
        for callee, its in _uses(function, name)
    )


def _uses(function: types.FunctionType, name: str) -> Iterator[tuple[types.FunctionType | None, str]]:
    """For each use of a variable but those that take an attribute of it, the script's function that gets it and the
    name of its parameter; None where something else does."""
    if (tree := _tree(function.__code__)) is None:
        yield None, ""
        return
    above = {below: node for node in ast.walk(tree) for below in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)):
            continue
        outer = above[node]
        if isinstance(outer, ast.Attribute):
            continue
        call: Any = above[outer] if isinstance(outer, ast.keyword) else outer
        called = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
        if called in BY_NAME and node is not call.func:
            continue
        known = {**function.__globals__, **variables_around(function)}
        callee = known.get(called) if called else None
        if not isinstance(callee, types.FunctionType) or is_installed(module_of(callee)):
            yield None, ""
        else:
            its = _parameter(callee, call, node)
            yield callee if its else None, its


def _parameter(callee: types.FunctionType, call: ast.Call, node: ast.Name) -> str:
    """The name of the callee's parameter that gets an argument; "" where it is one of several (``*args``)."""
    code = callee.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for keyword in call.keywords:
        if keyword.value is node:
            return keyword.arg if keyword.arg in names else ""
    before = call.args[: next(at for at, each in enumerate(call.args) if each is node)]
    starred = any(isinstance(each, ast.Starred) for each in before)
    return names[len(before)] if len(before) < code.co_argcount and not starred else ""


@functools.cache
def _tree(code: types.CodeType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):  # none, or a part of an expression
        return None
