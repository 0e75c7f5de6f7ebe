"""Check file and folder names given on the command line before any work is done."""

from __future__ import annotations

import stat
import unicodedata
from pathlib import Path

import typer

CONTROL_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, bytes that are not UTF-8, line and paragraph separators."""


def output_path(name: str | Path) -> Path:
    """Return the path of an output.

    Raises:
        typer.BadParameter: If the name is empty, most often an unset shell variable that would stand for the current
            folder, or contains control characters or is not UTF-8.
    """
    text = str(name)
    if not text:
        raise typer.BadParameter("the name is empty; perhaps a shell variable is not set.")
    if any(unicodedata.category(letter) in CONTROL_CATEGORIES for letter in text):
        raise typer.BadParameter(f"invalid name {ascii(text)[:200]}: it contains control characters or is not UTF-8.")
    return Path(text)


def require_writable(file: Path, option: str, suffix: str = "") -> None:
    """Check that a file can be written, and replaces nothing but a regular file.

    Args:
        file: Path of the file.
        option: Option that names it, for the message.
        suffix: Suffix that the name must have.

    Raises:
        RunError: If a folder, a device or a pipe is there, or the parent folder does not exist.
        RecipeError: If the name does not end in `suffix`.
    """
    from kdpipe.stages.errors import RecipeError, RunError

    mode = _mode(file, option)
    if mode is not None and not stat.S_ISREG(mode):
        raise RunError(f"{option} {file}: this is {_kind(mode)} and will not be replaced; name another file.")
    if not file.parent.is_dir():
        raise RunError(f"{option} {file}: there is no folder {file.parent}; create it first.")
    if suffix and file.suffix.lower() != suffix:
        raise RecipeError(f"{option} {file}: the name must end in {suffix}.")


def require_file(file: Path, option: str, what: str) -> None:
    """Raise RunError unless `file` is a regular file. `what` is the kind of file expected, for the message."""
    from kdpipe.stages.errors import RunError

    mode = _mode(file, option)
    if mode is None or not stat.S_ISREG(mode):
        found = "not found" if mode is None else f"this is {_kind(mode)}"
        raise RunError(f"{option} {file}: {found}; name a {what}.")


def _mode(file: Path, option: str) -> int | None:
    from kdpipe.stages.errors import RunError

    try:
        return file.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{option} {file}: invalid path ({error.strerror}).") from error


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"
