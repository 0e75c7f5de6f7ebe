"""References to user code, `python:package.module:function`, found on sys.path and in the current folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
import sysconfig
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
    """Return the digest of the source of what `reference` names, to detect later edits; see `object_sha256`."""
    return object_sha256(import_callable(reference, key, error), f"{key}={reference!r}", error)


def object_sha256(found: Any, where: str, error: type[KdpipeError]) -> str:
    """Return the sha256 of the source of a user's class or function, to detect later edits.

    Its module's file counts, and those of the user's own modules that it imports, directly or not; libraries do not.
    Of an object defined in a notebook or script only its own source counts.

    Raises:
        KdpipeError: `error`, if there is no source.
    """
    module = sys.modules.get(str(getattr(found, "__module__", None)))
    try:
        if module is None or module.__name__ == "__main__":
            return _sha256(inspect.getsource(found).encode())
        files = {name: Path(file).read_bytes() for name, file in _own_modules(module).items()}
    except (OSError, TypeError) as caught:
        what = getattr(module, "__file__", None) or "its module"
        raise error(
            f"{where}: later edits of its source could not be noticed, since {what} cannot be read "
            f"({cause(caught)}): put it in a file of your own."
        ) from caught
    if len(files) == 1:
        return _sha256(*files.values())
    return _sha256("".join(f"{name} {_sha256(files[name])}\n" for name in sorted(files)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_modules(module: ModuleType) -> dict[str, str]:
    """Return the files of a module and of the user's modules that it imports, by name.

    Raises OSError if the module has no file.
    """
    if not getattr(module, "__file__", None):
        raise FileNotFoundError(f"{module.__name__} has no file")
    package = module.__name__.partition(".")[0]
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        here = waiting.pop()
        file = getattr(here, "__file__", None)
        if here.__name__ in found or not file:
            continue
        if here is not module and here.__name__.partition(".")[0] != package and _is_library(here, file):
            continue
        found[here.__name__] = file
        for value in list(vars(here).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and isinstance(other := sys.modules.get(name), ModuleType):
                waiting.append(other)
    return found


def _is_library(module: ModuleType, file: str) -> bool:
    """Return whether a module is part of Python, of an installed package, or of kdpipe."""
    path = Path(file)
    if module.__name__.partition(".")[0] == "kdpipe" or {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


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
