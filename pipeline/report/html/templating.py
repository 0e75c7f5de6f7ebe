"""Render the page's templates. All text is escaped here, since names in a run folder are untrusted input."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdpipe.pipeline.report.formatting import percent, shortened
from kdpipe.pipeline.terminal.output import printable


class LeftOutError(Exception):
    """A section that cannot be shown; its message is shown in its place."""


def render(template: str, **context: object) -> Markup:
    """Render a file of templates/."""
    return Markup(_environment().get_template(template).render(context))


def link(target: str, text: str) -> Markup:
    return Markup('<a href="#{}">{}</a>').format(target, printable(text))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "shortened": shortened}
    return environment


def _finalize(value: Any) -> Any:
    """Replace control characters and marks of text direction by "?"; markup is rendered already."""
    return value if isinstance(value, Markup) else printable(str(value))
