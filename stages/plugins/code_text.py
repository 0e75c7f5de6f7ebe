"""The text of functions and classes of a notebook or script, and the names in their code."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import sys
from collections.abc import Callable
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

READ = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
"""Instructions that read a name outside the function."""

ADDING = ("append", "extend", "insert", "add", "update", "setdefault", "clear", "pop")
"""Methods by which code keeps a log or cache."""


def function_text(function: Any) -> str:
    """Return the source of a function; raises OSError or TypeError if there is none."""
    code = getattr(function, "__code__", None)
    return inspect.getsource(function if code is None else code)  # of a wrapper, not of what it wraps


def class_text(kind: type) -> str:
    """Return the source of a class; "" if there is none, and no method, so that its attributes describe it.

    Raises:
        OSError: There is no source; or TypeError.
    """
    methods = [each for member in vars(kind).values() for each in functions_of(member) if is_written_in(each, kind)]
    script = getattr(sys.modules.get(kind.__module__), "__file__", None)
    for method in methods:
        code = method.__code__
        cell = "".join(linecache.getlines(code.co_filename)) if code.co_filename != script else ""
        # In a notebook only the methods of a class have a reference to its cell.
        for node in [one for one in ast.walk(ast.parse(cell)) if isinstance(one, ast.ClassDef)]:
            if node.name == kind.__name__ and code.co_firstlineno in range(node.lineno, (node.end_lineno or 0) + 1):
                return ast.get_source_segment(cell, node) or cell
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        if methods:
            raise
        return ""


def functions_of(member: Any) -> list[FunctionType]:
    """Return the functions of an attribute of a class: itself, or those of a property, static or class method."""
    names = {
        staticmethod: ("__func__",),
        classmethod: ("__func__",),
        property: ("fget", "fset", "fdel"),
        functools.cached_property: ("func",),
    }.get(type(member), ())
    found = [getattr(member, name) for name in names] if names else [member]
    return [each for each in found if inspect.isfunction(each)]


def is_written_in(method: FunctionType, kind: type) -> bool:
    """Return whether the text of a class has that of a method."""
    return method.__code__.co_qualname.startswith(f"{kind.__qualname__}.")


def place_of(function: Any, *, in_file: bool) -> list[int]:
    """Return what distinguishes functions of equal names and text: the line in the file, and the end of a lambda."""
    code: CodeType = function.__code__
    place = [code.co_firstlineno] if in_file else []
    if code.co_name == "<lambda>":
        ends = [(line - code.co_firstlineno, column) for _, line, _, column in code.co_positions() if line and column]
        place += max(ends, default=())
    return place


def global_names(code: CodeType) -> set[str]:
    """Return the names outside a function that its code reads, also within nested functions."""
    return {one.argval for one in _instructions(code) if one.opname in READ}


def changed_names(code: CodeType) -> set[str]:
    """Return the names outside a function that its code sets, or whose list, set or dict it adds to: its state."""
    return _changed(code, (*READ, "LOAD_DEREF"), ("STORE_GLOBAL", "STORE_DEREF"))


def changed_attributes(function: Callable[..., Any]) -> set[str]:
    """Return the names of attributes that a function sets, or whose list, set or dict it adds to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else _changed(code, ("LOAD_ATTR",), ("STORE_ATTR",))


def _changed(code: CodeType, read: tuple[str, ...], stored: tuple[str, ...]) -> set[str]:
    added_to = {
        one.argval
        for one, following in pairwise(_instructions(code))
        if one.opname in read and following.opname in ("LOAD_ATTR", "LOAD_METHOD") and following.argval in ADDING
    }
    return added_to | {one.argval for one in _instructions(code) if one.opname in stored}


def _instructions(code: CodeType) -> list[dis.Instruction]:
    nested = [each for constant in code.co_consts if isinstance(constant, CodeType) for each in _instructions(constant)]
    return [*dis.get_instructions(code), *nested]
