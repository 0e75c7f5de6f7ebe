"""Print results, JSON documents, and sentences for people. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TextIO

from kdpipe.store.redact import redacted, redacted_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_SENTENCE_LENGTH = 2000
FILE_WIDTH = 120
"""Columns of tables that do not go to a terminal, unless COLUMNS says otherwise."""


class Verbosity(IntEnum):
    """How much goes to stderr: warnings and errors, progress too, or timings and tracebacks too."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_verbosity = Verbosity.NORMAL


def set_verbosity(verbosity: Verbosity) -> None:
    """Set the verbosity of this process."""
    global _verbosity  # noqa: PLW0603
    _verbosity = verbosity


def verbosity() -> Verbosity:
    """Return the verbosity of this process."""
    return _verbosity


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document to stdout, URLs redacted."""
    print(json.dumps(redacted_json(document)))  # noqa: T201


def print_result(as_json: bool, document: dict[str, Any], print_text: Callable[[], None]) -> None:
    """Print a result to stdout: the JSON document, or what `print_text` prints."""
    if as_json:
        print_json(document)
    else:
        print_text()


def printable(text: str) -> str:
    """Redact URLs, and replace control characters, which untrusted file names may contain, by question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in redacted(text))


def print_line(sentence: str) -> None:
    """Print one sentence to stderr; a closed or full stderr is ignored."""
    if sys.stderr is not None:  # else print would write to stdout
        with suppress(OSError, ValueError):
            print(f"kdpipe: {printable(_shortened(redacted(sentence)))}", file=sys.stderr, flush=True)  # noqa: T201


def print_warning(sentence: str) -> None:
    """Print one warning to stderr."""
    print_line(f"warning: {sentence}")


def print_info(sentence: str) -> None:
    """Print one sentence to stderr, unless kdpipe was asked to be quiet."""
    if _verbosity > Verbosity.QUIET:
        print_line(sentence)


def print_debug(sentence: str) -> None:
    """Print one sentence to stderr with --verbose."""
    if _verbosity == Verbosity.VERBOSE:
        print_line(f"debug: {sentence}")


def console(file: TextIO | None = None) -> Console:
    """Return a rich console on stdout, or on `file`, without markup, as wide as the terminal or as COLUMNS says."""
    from rich.console import Console

    made = Console(file=file, markup=False, highlight=False, soft_wrap=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").strip("0").isdecimal():
        made.width = FILE_WIDTH
    return made


def new_table(title: str | None = None, *, show_lines: bool = False) -> Table:
    """Return an empty table in the style of all tables of kdpipe."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE, title=title, title_justify="left", show_lines=show_lines)


def _shortened(sentence: str) -> str:
    """Cut the middle out of very long words, such as a name of 100,000 letters, if the sentence is too long."""
    if len(sentence) <= MAX_SENTENCE_LENGTH:
        return sentence
    words = (word if len(word) <= 200 else f"{word[:100]}...{word[-90:]}" for word in sentence.split(" "))
    return " ".join(words)[: 2 * MAX_SENTENCE_LENGTH]
