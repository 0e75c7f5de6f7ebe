"""Where people ask for a file or a folder of their own: what cannot be one is refused before any work is done."""

from __future__ import annotations

import stat
import unicodedata
from pathlib import Path

import typer

UNSPOKEN = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of letters, by Unicode: control characters, bytes that are no UTF-8, ends of lines and paragraphs."""


def named(given: str | Path) -> Path:
    """The path that an option names: of what a command makes or fills.

    Raises typer.BadParameter for no name at all, which is most often an unset variable of a shell and would stand for
    the current folder, and for one with control characters or that is no UTF-8, over which other programs stumble.
    """
    text = str(given)
    if not text:
        raise typer.BadParameter("the name is empty: a variable of the shell may not be set.")
    if any(unicodedata.category(letter) in UNSPOKEN for letter in text):
        raise typer.BadParameter(f"{ascii(text)[:200]} is no name to give: it has control characters, or is no UTF-8.")
    return Path(text)


def require_place(file: Path, asked_by: str, suffix: str = "") -> None:
    """Raise RunError where a file cannot be written at `file`, or only in the place of what is no plain file: a folder,
    a device, a pipe; RecipeError where its name does not end in `suffix`. asked_by: "--html", say, for the sentence.
    """
    from stages.errors import RecipeError, RunError

    mode = _mode(file, asked_by)
    if mode is not None and not stat.S_ISREG(mode):
        raise RunError(f"{asked_by} {file}: that is {_kind(mode)}, and stays: name another file.")
    if not file.parent.is_dir():
        raise RunError(f"{asked_by} {file}: there is no folder {file.parent}: make it first.")
    if suffix and file.suffix.lower() != suffix:
        raise RecipeError(f"{asked_by} {file}: end its name in {suffix}.")


def require_file(file: Path, asked_by: str, what: str) -> None:
    """Raise RunError where there is no plain file at `file` to be read. what: which kind of file is wanted there."""
    from stages.errors import RunError

    mode = _mode(file, asked_by)
    if mode is None or not stat.S_ISREG(mode):
        found = "" if mode is None else f", that is {_kind(mode)}"
        raise RunError(f"{asked_by} {file}: there is no {what}{found}: name one.")


def _mode(file: Path, asked_by: str) -> int | None:
    """What is at a path, by the bits of stat; None where nothing is."""
    from stages.errors import RunError

    try:
        return file.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{asked_by} {file}: there can be no such file ({error.strerror}).") from error


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "no plain file"
