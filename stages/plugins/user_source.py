"""The digest of the source of user code, which is part of the identity of what it makes."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import linecache
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import cause
from kdpipe.store.errors import KdpipeError

ALIAS = "_user_"
"""Begins the names of modules that are imported under another name than their own."""

LIBRARIES = ("site-packages", "dist-packages")
"""Names of the folders of installed packages."""

NOT_FOLLOWED = frozenset({"kdpipe", "timm", "torch", "torchvision"})
"""Libraries of which at most the file that defines the object itself counts."""

_imported: dict[str, tuple[ModuleSpec, bytes]] = {}
"""Sources of modules as first read since their import, by name."""


def object_sha256(found: Any, where: str, error: type[KdpipeError], *, module: str | None = None) -> str:
    """Return the sha256 of the source of a user's class or function, to detect later edits.

    The file of its module counts, and those of the user's own modules that it imports, directly or not, at the top or
    within a function; libraries do not. Of an object defined in a notebook or script only its own source counts. A
    module that was edited after its import counts as it was, with a warning: that is the code that runs.

    Args:
        found: The object.
        where: What it is, to begin error messages with.
        error: The class of errors.
        module: The name of the imported module that it was found in, if known; its file counts too.

    Raises:
        KdpipeError: `error`, if there is no source.
    """
    own = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
    defined_in = str(getattr(own, "__module__", None))
    if module is None and isinstance(found, functools.partial):
        raise error(f"{where}: later edits of a functools.partial could not be noticed: write a function instead.")
    try:
        if (module or defined_in) == "__main__":
            return _sha256(_source_in_main(own).encode())
        wanted = [module or defined_in] if module is None or _is_library(defined_in) else [module, defined_in]
        sources = _own_sources(wanted)
    except (OSError, TypeError) as caught:
        what = getattr(sys.modules.get(module or defined_in), "__file__", None) or "its module"
        raise error(
            f"{where}: later edits of its source could not be noticed, since {what} cannot be read "
            f"({cause(caught)}): put it in a file of your own."
        ) from caught
    if len(sources) == 1:
        return _sha256(*sources.values())
    lines = sorted(f"{re.sub(f'^{ALIAS}[0-9a-f]{{8}}_', '', name)} {_sha256(sources[name])}\n" for name in sources)
    return _sha256("".join(lines).encode())


def find_spec(name: str) -> ModuleSpec | None:
    """Return where a module was or would be imported from, without importing it or a package around it."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    parent = name.rpartition(".")[0]
    try:
        if not parent:
            return importlib.util.find_spec(name)
        package = find_spec(parent)
        folders = package.submodule_search_locations if package else None
        return PathFinder.find_spec(name, folders) if folders else None
    except (ImportError, ValueError, AttributeError):  # of other people's finders
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _source_in_main(own: Any) -> str:
    """Return the source of a class or function of a script or notebook; raises OSError or TypeError if it has none."""
    try:
        return inspect.getsource(own)
    except (OSError, TypeError):  # of a class in a notebook: only its methods know their cell
        for method in filter(inspect.isfunction, vars(own).values() if inspect.isclass(own) else ()):
            cell = "".join(linecache.getlines(method.__code__.co_filename))
            for node in ast.walk(ast.parse(cell)) if own.__name__ in cell else ():
                if isinstance(node, ast.ClassDef) and node.name == own.__name__:
                    return ast.get_source_segment(cell, node) or cell
        raise


def _own_sources(wanted: Iterable[str]) -> dict[str, bytes]:
    """Return the sources of modules and of the user's modules that they import, by name.

    Raises OSError if one of `wanted` has no file.
    """
    waiting = list(wanted)
    required, packages = set(waiting), {name.partition(".")[0] for name in waiting} - NOT_FOLLOWED
    found: dict[str, bytes] = {}
    while waiting:
        name = waiting.pop()
        spec = find_spec(name)
        if name in found or spec is None or not spec.has_location or spec.origin is None:
            if name in required - set(found):
                raise FileNotFoundError(f"{name} has no file")
            continue
        found[name] = _source(name, spec.origin, spec)
        package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        for imported in _imports(found[name], package):
            if imported.partition(".")[0] in packages or not _is_library(imported):
                waiting.append(imported)
    return found


def _source(name: str, origin: str, spec: ModuleSpec) -> bytes:
    """Return the source of a module as it was imported, if it is."""
    now = Path(origin).read_bytes()
    if name not in sys.modules:
        return now
    if name not in _imported or _imported[name][0] is not spec:  # imported since, or reloaded
        _imported[name] = (spec, now)
    before = _imported[name][1]
    if before != now:
        warnings.warn(
            f"{origin} was edited after it was imported: the code as imported is used, and counts. Restart Python, or "
            "importlib.reload the module, to use the edited one.",
            stacklevel=2,
        )
    return before


@lru_cache(maxsize=4096)
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """Return the names of what a module of `package` imports, some of which are no modules; () for no Python source."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return ()
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    parts = [name.split(".") for name in names]
    return tuple(dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)))


def _is_library(name: str) -> bool:
    """Return whether a module is part of Python, of an installed package, or of kdpipe, or there is none."""
    package = name.partition(".")[0]
    spec = None if package in NOT_FOLLOWED | sys.stdlib_module_names else find_spec(package)
    if spec is None:
        return True
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return not places or any(
        not set(LIBRARIES).isdisjoint(path.parts) or any(map(path.is_relative_to, folders))
        for path in map(Path, places)
    )
