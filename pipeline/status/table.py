"""The tables of `kdpipe status`, for people: a line for each run and store, and below it what has no room beside.

Written by hand: rich alone would take a sixth of the time in which `kdpipe status` answers.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from pipeline.status.runs import RunStatus
from pipeline.status.scan import Status
from pipeline.status.stores import StoreStatus
from pipeline.terminal.output import printable
from pipeline.terminal.rate import duration_text, rate_text

WIDTH_OF_FILES = 120
MOST_AT_WORK = 3
GAP, INDENT = "  ", "    "

RUN = ("run", "state", "at", "done", "networks", "rate", "left", "last sign", "size", "test accuracy")
STORE = ("store", "state", "teacher", "holds", "units", "at work", "last sign", "size")
TO_THE_RIGHT = {"done", "networks", "rate", "left", "last sign", "size", "units"}

BELOW = ("at", "test accuracy", "at work", "teacher", "holds", "rate", "left", "networks", "size", "last sign", "units")
"""What goes to the line below where there is no room beside, in this order."""

WORDS = {"networks": "{} networks", "left": "{} left", "units": "{} units", "done": "{} done"}
BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
STYLES = {"running": GREEN, "being filled": GREEN, "killed": RED, "damaged": RED, "stopped early": YELLOW}


def print_tables(status: Status) -> None:
    """Runs, then stores, on stdout."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else WIDTH_OF_FILES
    now, root = time.time(), Path(status.root)
    runs = table(RUN, [_run_cells(run, root, now) for run in status.runs], width)
    stores = table(STORE, [_store_cells(store, root, now) for store in status.stores], width)
    lines = [*runs, *([[]] if runs and stores else []), *stores] or [[(f"no run and no store below {root}", "")]]
    in_colour = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    for line in lines:
        print("".join(_painted(printable(text), style, in_colour) for text, style in line).rstrip())  # noqa: T201


def _run_cells(run: RunStatus, root: Path, now: float) -> dict[str, str]:
    at = f"{run.stage}: {run.job}" if run.job else run.command
    is_over = run.state in {"done", "idle"}
    return {
        "run": _name(run.path, root),
        "state": run.state,
        "at": "" if is_over else f"{at} ({run.who})" if run.who else at,
        "done": f"{100 * run.step // run.total} %" if run.step is not None and run.total and not is_over else "",
        "networks": f"{run.num_networks_done}/{run.num_networks}" if run.num_networks else "",
        "rate": rate_text(run.rate_per_s, run.unit),
        "left": "" if run.eta_s is None else duration_text(run.eta_s),
        "last sign": _ago(run.last_sign, now),
        "size": _size(run.disk_bytes),
        "test accuracy": ", ".join(f"{name} {accuracy:.2f} %" for name, accuracy in run.accuracies.items()),
    }


def _store_cells(store: StoreStatus, root: Path, now: float) -> dict[str, str]:
    more = len(store.at_work) - MOST_AT_WORK
    at_work = "; ".join(store.at_work[:MOST_AT_WORK]) + (f" and {more} more" if more > 0 else "")
    return {
        "store": _name(store.path, root),
        "state": store.state,
        "teacher": f"{store.teacher} on {store.data}" if store.data else store.teacher,
        "holds": f"{store.num_samples:,} x {store.num_views} views" if store.num_views else "",
        "units": f"{store.num_units_done:,}/{store.num_units:,}" if store.num_units else "",
        "at work": at_work,
        "last sign": _ago(store.last_sign, now),
        "size": _size(store.disk_bytes),
    }


def table(headers: Sequence[str], rows: Sequence[dict[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Lines as pieces of text with their styles: the headers that have something below them, then the rows."""
    widths = {
        name: max(cells(name), *[cells(row[name]) for row in rows])
        for name in (headers if rows else ())
        if any(row[name] for row in rows)
    }
    if not widths:
        return []
    widths[headers[0]] = min(widths[headers[0]], max(16, width // 3))
    below = []
    for name in BELOW:
        if sum(widths.values()) + len(GAP) * (len(widths) - 1) <= width:
            break
        if widths.pop(name, None) is not None:
            below.append(name)
    lines = _row({name: name for name in headers}, widths, dict.fromkeys(headers, DIM))
    for row in rows:
        state = row["state"]
        style = STYLES.get(state, RED if state.startswith("failed") else "")
        lines += _row(row, widths, {"state": style, headers[0]: BOLD})
        more = [WORDS.get(name, "{}").format(row[name]) for name in headers if name in below and row[name]]
        lines += [[(INDENT + line, "")] for line in textwrap.wrap("; ".join(more), max(10, width - len(INDENT)))]
    return lines


def _row(row: dict[str, str], widths: dict[str, int], styles: dict[str, str]) -> list[list[tuple[str, str]]]:
    """One row; a name that is longer than its column has a line to itself, whole."""
    lines: list[list[tuple[str, str]]] = []
    line: list[tuple[str, str]] = []
    for name, width in widths.items():
        cell = row[name]
        if not line and cells(cell) > width:
            lines.append([(cell, styles.get(name, ""))])
            cell = ""
        pad = " " * (width - cells(cell))
        before, after = (pad, "") if name in TO_THE_RIGHT else ("", pad)
        line += [(GAP if line else "", ""), (before, ""), (cell, styles.get(name, "")), (after, "")]
    return [*lines, line]


def cells(text: str) -> int:
    """The columns that a text takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(letter) in {"W", "F"} for letter in text) if not text.isascii() else 0
    return len(text) + wide


def _painted(text: str, style: str, in_colour: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if in_colour and style and text else text


def _name(path: str, root: Path) -> str:
    """As seen from the folder that was asked about."""
    here = Path(path)
    return printable(str(here.relative_to(root)) if here != root else str(root) if root.name else root.resolve().name)


def _ago(moment: float, now: float) -> str:
    return f"{duration_text(now - moment)} ago" if moment > 0 else ""


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
