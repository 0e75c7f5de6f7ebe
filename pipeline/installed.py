"""Which kdpipe this is: its version and commit, and the versions of what it stands on. Nothing is imported to know."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

NAME = "kdpipe"
GIT_S = 5.0


def versions() -> dict[str, str | None]:
    """kdpipe's version and those of the packages that it needs, by name; None where one is not installed."""
    try:
        wanted = requires(NAME) or []
    except PackageNotFoundError:  # run from a folder of sources
        wanted = []
    names = [found.group() for one in wanted if (found := re.match(r"[A-Za-z0-9._-]+", one))]
    return {name: _version(name) for name in dict.fromkeys([NAME, *names])}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that kdpipe runs from, and whether tracked files differ from it.

    (None, None) where it was installed as a package, or git is absent: the folder it lies in may be in somebody else's
    repository.
    """
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    if head is None or not re.fullmatch("[0-9a-f]{40,64}", head):
        return None, None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head, None if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None where it cannot. It writes nothing, not even its index."""
    # A hook of git may have set GIT_DIR: this is about kdpipe's own checkout.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        said = subprocess.run(
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
    return said.stdout.strip()
