"""Check file and folder names given on the command line before any work is done."""

from __future__ import annotations

import stat
import unicodedata
from pathlib import Path

import typer


def output_path(name: str | Path) -> Path:
    """Return the path of an output; a name that is empty (an unset shell variable) or not printable is refused."""
    text = str(name)
    if not text:
        raise typer.BadParameter("the name is empty; perhaps a shell variable is not set.")
    # Control characters, bytes that are not UTF-8, line and paragraph separators.
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
        raise typer.BadParameter(f"invalid name {ascii(text)[:200]}: it contains control characters or is not UTF-8.")
    return Path(text)


def require_writable(file: Path, option: str, suffix: str = "") -> None:
    """Check that a file can be written, and replaces nothing but a regular file. `option` is named in messages."""
    from kdpipe.stages.errors import RecipeError, RunError

    kind = _kind(file, option)
    if kind not in ("not found", "a file"):
        raise RunError(f"{option} {file}: this is {kind} and will not be replaced; name another file.")
    if not file.parent.is_dir():
        raise RunError(f"{option} {file}: there is no folder {file.parent}; create it first.")
    if suffix and file.suffix.lower() != suffix:
        raise RecipeError(f"{option} {file}: the name must end in {suffix}.")


def require_file(file: Path, option: str, what: str) -> None:
    """Raise RunError unless `file` is a regular file. `what` is the kind of file expected, for the message."""
    from kdpipe.stages.errors import RunError

    if (kind := _kind(file, option)) != "a file":
        raise RunError(f"{option} {file}: {kind if kind == 'not found' else f'this is {kind}'}; name a {what}.")


def _kind(file: Path, option: str) -> str:
    from kdpipe.stages.errors import RunError

    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return "not found"
    except OSError as error:
        raise RunError(f"{option} {file}: invalid path ({error.strerror}).") from error
    return "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"
