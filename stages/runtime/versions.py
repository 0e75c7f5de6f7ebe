"""Versions of kdpipe and its dependencies, and its commit, read without importing any of them."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from kdpipe.stages.errors import ModelError

NAME = "kdpipe"
GIT_S = 5.0


def versions() -> dict[str, str | None]:
    """Return the versions of kdpipe and its dependencies by name; None where one is not installed."""
    try:
        required = requires(NAME) or []
    except PackageNotFoundError:  # run from a folder of sources
        required = []
    names = [found.group() for entry in required if (found := re.match(r"[A-Za-z0-9._-]+", entry))]
    return {name: _version(name) for name in dict.fromkeys([NAME, *names])}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a store's numbers without a change to the recipe."""
    names = ("kdpipe", "numpy", "pillow", "torch", "torchvision", "zarr")
    return {name: version(name) for name in names}


def require_library(name: str, needed_by: str) -> None:
    """Raise ModelError with the extra to install unless the library of a runtime is installed."""
    if find_spec(name) is None:
        raise ModelError(f"{needed_by} needs {name}, which is not installed: pip install 'kdpipe[{name}]'.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def commit() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that kdpipe runs from, and whether tracked files differ from it.

    Returns (None, None) where it was installed as a package, or git is absent: the folder that it is installed in may
    belong to another repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    if head is None or not re.fullmatch("[0-9a-f]{40,64}", head):
        return None, None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head, None if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output; None where it fails. git writes nothing, not even its index."""
    # A hook of git may have set GIT_DIR: this is about kdpipe's own checkout.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_S,
            stdin=subprocess.DEVNULL,
            env={**environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
