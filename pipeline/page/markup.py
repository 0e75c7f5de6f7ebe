"""The words and tables of the HTML page: everything that comes from a run folder is escaped here, and nowhere else.

A string is text until this room has made it `Html`; whatever takes a cell or a caption escapes what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.terminal.output import printable


class Html(str):
    """Text that is HTML already, and safe."""

    __slots__ = ()


class LeftOutError(Exception):
    """A section that a run has nothing for; its text is the sentence that stands in its place."""


def safe(value: object) -> Html:
    """Any value as HTML: control characters and marks of direction become "?", the rest is escaped."""
    return value if isinstance(value, Html) else Html(escape(printable(str(value))))


def short(text: str, most: int) -> str:
    """At most so many letters of a text: its beginning and its end, which is what tells one name from the next."""
    whole = printable(text)
    if len(whole) <= most:
        return whole
    tail = (most - 1) // 3
    return f"{whole[: most - 1 - tail]}…{whole[len(whole) - tail :] if tail else ''}"


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(safe(part) for part in parts))


def element(tag: str, *parts: object, **attributes: object) -> Html:
    """<tag attribute="value">parts</tag>; `kind` stands for class."""
    names = {"kind": "class"}
    given = "".join(f' {names.get(name, name)}="{safe(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{join(parts)}</{tag}>")


def table(caption: object, headers: Sequence[object], rows: Iterable[Sequence[object]], *, num_names: int = 1) -> Html:
    """A table whose rows' first cells are their headers, in a box of its own that scrolls where it is too wide.

    num_names: so many columns from the left hold names; the others hold numbers, which stand to the right.
    """
    head = join(element("th", one, scope="col") for one in headers)
    lines = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    inside = (
        element("caption", element("span", caption)),
        element("thead", element("tr", head)),
        element("tbody", join(lines, "\n")),
    )
    return scrolling(element("table", *inside, kind=f"names{num_names}"), str(caption))


def tables(made: Iterable[Html]) -> Html:
    """Several tables, side by side as far as there is room."""
    return element("div", *made, kind="tables")


def scrolling(content: Html, label: str) -> Html:
    """A box that scrolls sideways, by keyboard too."""
    return element("div", content, kind="scroll", tabindex=0, role="region", **{"aria-label": label})


def details(summary: object, *parts: object) -> Html:
    """What is folded away until it is asked for."""
    return element("details", element("summary", summary), *parts)


def note(*parts: object) -> Html:
    return element("p", *parts, kind="note")


def figure(caption: object, *parts: object, kind: str = "panels") -> Html:
    """Diagrams side by side, as many as fit, with what they show below."""
    return element("figure", element("div", *parts, kind=kind), element("figcaption", caption))


def key(kind: str, name: object) -> Html:
    """An entry of a legend: a piece of line as it is drawn, and its name."""
    line = Html(
        f'<svg class="chart swatch {kind}" viewBox="0 0 28 8" aria-hidden="true"><path class="mean" d="M1 4H27"/></svg>'
    )
    return element("span", line, name, kind="key")
