"""References to user code, `python:package.module:function`, found in the current folder first, then on sys.path.

The current folder stands in sys.path behind Python and the installed packages: user code finds its other modules there
at any time, and no library finds a user's `random.py`. The module that a reference names is taken from the current
folder even if a library has its name; it is then imported under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kdpipe.stages.errors import cause
from kdpipe.stages.plugins.module_source import ALIAS, LIBRARIES, find_spec
from kdpipe.stages.plugins.user_source import object_sha256
from kdpipe.store.errors import KdpipeError, did_you_mean

__all__ = ["PREFIX", "import_callable", "is_user_reference", "object_sha256", "source_sha256", "user_code_context"]

PREFIX = "python:"

_added: list[str] = []
"""The entry of sys.path for the current folder, if it had none."""


def is_user_reference(name: str) -> bool:
    """Return whether a name in a recipe refers to user code."""
    return name.startswith(PREFIX)


@contextlib.contextmanager
def user_code_context() -> Iterator[None]:
    """Let user code find modules of the current folder, also later; send prints to stderr: stdout is for results.

    The current folder and torch's settings are afterwards as they were: paths of the recipe are relative, and its
    `num_threads` holds.
    """
    if (folder := str(Path.cwd())) not in sys.path:
        entries = [entry for entry in sys.path if entry not in _added]
        installed = [place for place, entry in enumerate(entries, 1) if Path(entry).name in LIBRARIES]
        # Before the checkouts that are installed in place, of which kdpipe's has folders named store and pipeline.
        entries.insert(max(installed, default=len(entries)), folder)
        sys.path[:], _added[:] = entries, [folder]
    with contextlib.redirect_stdout(sys.stderr), _settings_kept():
        yield


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Restore the current folder, and torch's default dtype and device, grad mode and threads."""
    folder, dtype, device = Path.cwd(), torch.get_default_dtype(), torch.get_default_device()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def import_callable(reference: str, key: str, error: type[KdpipeError]) -> Callable[..., Any]:
    """Import and return the function that `reference`, the value of the recipe's `key`, names.

    Raises `error` if the reference is malformed, its module cannot be imported, or has no such function.
    """
    module_name, function_name = _split(reference, key, error)
    module = _import(module_name, reference, key, error)
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        hint = did_you_mean(function_name, functions, limit=3, otherwise="check its spelling.")
        raise error(f"{key}={reference!r}: {module_name} has no function {function_name}; {hint}")
    return function


def source_sha256(reference: str, key: str, error: type[KdpipeError]) -> str:
    """Return the digest of the source of what `reference` names, to detect later edits; see `object_sha256`."""
    module_name, _ = _split(reference, key, error)
    found = import_callable(reference, key, error)
    module = _import(module_name, reference, key, error)
    return object_sha256(found, f"{key}={reference!r}", error, module=module.__name__)


def _split(reference: str, key: str, error: type[KdpipeError]) -> tuple[str, str]:
    module_name, _, function_name = reference.removeprefix(PREFIX).partition(":")
    if not is_user_reference(reference) or not module_name or not function_name:
        raise error(f"{key}={reference!r} must read python:package.module:function.")
    return module_name, function_name


def _import(module_name: str, reference: str, key: str, error: type[KdpipeError]) -> ModuleType:
    try:
        with user_code_context():
            return importlib.import_module(_importable_name(module_name))
    except (Exception, SystemExit) as caught:  # it runs the user's own code
        raise error(
            f"{key}={reference!r}: the module {module_name} cannot be imported ({cause(caught)}); "
            f"it is looked for in {Path.cwd()} and on sys.path."
        ) from caught


def _importable_name(module_name: str) -> str:
    """Return the name under which to import a user's module: not its own where that means another file."""
    package, dot, rest = module_name.partition(".")
    if package not in sys.modules:
        importlib.invalidate_caches()  # the file may have been written a moment ago
    local, usual = PathFinder.find_spec(package, [str(Path.cwd())]), find_spec(package)
    if local is None or local.origin is None or (usual and _same_file(local.origin, usual.origin)):
        return module_name
    alias = f"{ALIAS}{hashlib.sha256(local.origin.encode()).hexdigest()[:8]}_{package}"
    if alias not in sys.modules:
        _load_as(alias, local)
    return alias + dot + rest


def _same_file(one: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def _load_as(alias: str, found: ModuleSpec) -> None:
    """Import the module of a top-level file or package under the name `alias`."""
    spec = importlib.util.spec_from_file_location(
        alias, found.origin, submodule_search_locations=found.submodule_search_locations
    )
    assert spec is not None and spec.loader is not None
    sys.modules[alias] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
