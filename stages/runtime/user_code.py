"""References to user code, `python:package.module:function`, found on sys.path and in the current folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kdpipe.stages.errors import cause
from kdpipe.store.errors import KdpipeError, did_you_mean

PREFIX = "python:"


def is_user_reference(name: str) -> bool:
    """Return whether a name in a recipe refers to user code."""
    return name.startswith(PREFIX)


@contextlib.contextmanager
def user_code_context() -> Iterator[None]:
    """Look for modules in the current folder first, as Python does; send prints to stderr: stdout is for results."""
    before, sys.path = sys.path, [str(Path.cwd()), *sys.path]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path = before


def import_callable(reference: str, key: str, error: type[KdpipeError]) -> Callable[..., Any]:
    """Import and return the function that `reference`, the value of the recipe's `key`, names.

    Raises `error` if the reference is malformed, its module cannot be imported, or has no such function.
    """
    module_name, function_name = _split(reference, key, error)
    module = _import(module_name, reference, key, error)
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        hint = did_you_mean(function_name, vars(module), limit=3, otherwise="check its spelling.")
        raise error(f"{key}={reference!r}: {module_name} has no function {function_name}; {hint}")
    return function


def source_sha256(reference: str, key: str, error: type[KdpipeError]) -> str:
    """Return the sha256 of the file of the module that `reference` names, to detect later edits.

    Modules that it imports are not included. Raises `error` as `import_callable` does, and if there is no such file.
    """
    module_name, _ = _split(reference, key, error)
    file = getattr(_import(module_name, reference, key, error), "__file__", None)
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except OSError as caught:
        where = f"its file {file} cannot be read ({cause(caught)})" if file else "it has no file"
        raise error(
            f"{key}={reference!r}: later edits of {module_name} could not be noticed, since {where}: put the function "
            "in a file of your own."
        ) from caught


def _split(reference: str, key: str, error: type[KdpipeError]) -> tuple[str, str]:
    module_name, _, function_name = reference.removeprefix(PREFIX).partition(":")
    if not is_user_reference(reference) or not module_name or not function_name:
        raise error(f"{key}={reference!r} must read python:package.module:function.")
    return module_name, function_name


def _import(module_name: str, reference: str, key: str, error: type[KdpipeError]) -> ModuleType:
    try:
        with user_code_context():
            return importlib.import_module(module_name)
    except (Exception, SystemExit) as caught:  # it runs the user's own code
        raise error(
            f"{key}={reference!r}: the module {module_name} cannot be imported ({cause(caught)}); "
            f"it is looked for on sys.path and in {Path.cwd()}."
        ) from caught
