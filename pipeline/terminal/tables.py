"""Tables of names and numbers on a terminal, in which no cell with a number is ever wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdpipe.pipeline.terminal.output import new_table, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

MIN_NAME_WIDTH = 16
"""Columns that a name gets at least; longer ones are folded to two fifths of the terminal."""


@dataclass(frozen=True)
class Table:
    """A table of text. The first `num_names` columns hold names, the others numbers."""

    caption: str
    headers: Sequence[object]
    rows: Sequence[Sequence[object]]
    num_names: int = 1


def print_table(out: Console, table: Table) -> None:
    """Print a table.

    If it is too wide, its headers are broken at spaces; if that is not enough, its columns are spread over several
    tables below one another, each with the names.
    """
    from rich.text import Text

    if table.caption:
        out.print(Text(printable(table.caption), style="italic"))
    whole = _drawn(table, range(len(table.headers)), out.width, break_headers=False)
    if _fits(out, whole):
        out.print(whole)
        return
    for columns in _spread(out, table):
        out.print(_drawn(table, columns, out.width))


def print_short_table(out: Console, table: Table, full: str) -> None:
    """Print a table without the columns that say nothing, and without the last ones that do not fit.

    `full` is the command that prints all of them; a line names those that did not fit.
    """
    names = list(range(table.num_names))
    told = [
        n for n in range(len(table.headers)) if n in names or any(str(row[n]) not in ("", "-") for row in table.rows)
    ]
    shown = list(told)
    while len(shown) > len(names) + 1 and not _fits(out, _drawn(table, shown, out.width)):
        shown.pop()
    print_table(out, _columns_of(table, shown))
    if more := [str(table.headers[column]) for column in told[len(shown) :]]:
        out.print(printable(f"more: {', '.join(more)}: {full}"), soft_wrap=True)


def _columns_of(table: Table, columns: Sequence[int]) -> Table:
    rows = [[row[column] for column in columns] for row in table.rows]
    return replace(table, headers=[table.headers[column] for column in columns], rows=rows)


def _spread(out: Console, table: Table) -> Iterator[Sequence[int]]:
    """Yield groups of columns that fit, each with the names."""
    names = list(range(table.num_names))
    group: list[int] = []
    for column in range(table.num_names, len(table.headers)):
        if group and not _fits(out, _drawn(table, [*names, *group, column], out.width)):
            yield [*names, *group]
            group = []
        group.append(column)
    yield [*names, *group]


def _fits(out: Console, drawn: RichTable) -> bool:
    return out.measure(drawn, options=out.options.update(width=10**6)).maximum <= out.width


def _drawn(table: Table, columns: Sequence[int], width: int, *, break_headers: bool = True) -> RichTable:
    """Return some of a table's columns."""
    from rich.text import Text

    made = new_table()
    for column in columns:
        header, is_name = str(table.headers[column]), column < table.num_names
        widest = max((len(str(row[column])) for row in table.rows), default=0)
        if break_headers:
            header = textwrap.fill(header, max(widest, *map(len, header.split()), 1), break_long_words=False)
        limit = max(MIN_NAME_WIDTH, width * 2 // 5) if is_name else None
        made.add_column(
            header,
            justify="left" if is_name else "right",
            no_wrap=not is_name,
            overflow="fold",
            max_width=limit,
        )
    for row in table.rows:
        made.add_row(*(Text(printable(str(row[column]))) for column in columns))  # Text: "[" is not markup
    return made
