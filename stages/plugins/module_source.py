"""The files of modules of user code, as they were when they were imported, and the digest of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ALIAS = "_user_"
"""Begins the names of modules that are imported under another name than their own."""

LIBRARIES = ("site-packages", "dist-packages")
"""Names of the folders of installed packages."""

NOT_FOLLOWED = frozenset({"kdpipe", "timm", "torch", "torchvision"})
"""Libraries of which at most the file that defines the object itself counts."""

MAIN = ("__main__", "__mp_main__")
"""Names of the module of a notebook or script."""

_imported: dict[str, tuple[ModuleSpec, bytes]] = {}
"""Sources of modules as first read since their import, by name."""


def modules_sha256(names: Iterable[str]) -> str:
    """Return the sha256 of the files of modules and of the user's own modules that they import.

    Raises:
        OSError: One of them has no file.
    """
    sources = _own_sources(names)
    if len(sources) == 1:
        return _sha256(*sources.values())
    lines = sorted(f"{true_name(name)} {_sha256(sources[name])}\n" for name in sources)
    return _sha256("".join(lines).encode())


def true_name(name: str) -> str:
    """Return the name of a module in its file's folder, also if it was imported under another one."""
    return re.sub(f"^{ALIAS}[0-9a-f]{{8}}_", "", name)


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


def is_own(name: str) -> bool:
    """Return whether a module is the user's: the notebook or script, a file of no library, or one that is unknown."""
    package = name.partition(".")[0]
    if name in MAIN or package in NOT_FOLLOWED | sys.stdlib_module_names:
        return name in MAIN
    return find_spec(package) is None or not is_library(name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
            if imported.partition(".")[0] in packages or not is_library(imported):
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


def is_library(name: str) -> bool:
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
