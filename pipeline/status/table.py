"""Print the status of runs and stores: as tables, or as paragraphs on a narrow terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.status.runs import RunStatus
from kdpipe.pipeline.status.stores import StoreStatus
from kdpipe.pipeline.terminal.output import console, new_table, printable
from kdpipe.pipeline.terminal.rate import duration_text, rate_text

if TYPE_CHECKING:
    from rich.console import Console

MAX_WORKERS = 3
RIGHT_ALIGNED = {"done", "networks", "rate", "left", "last active", "size", "units"}
STYLES = {
    "running": "green",
    "being filled": "green",
    "killed": "red",
    "damaged": "red",
    "stopped early": "yellow",
}


@dataclass(frozen=True)
class Status:
    """Status of all runs and stores below `root`, most recently active first, with notes on unreadable folders."""

    root: str
    runs: list[RunStatus] = field(default_factory=list)
    stores: list[StoreStatus] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON; times are in seconds since 1970."""
        return {"command": "status", **asdict(self)}


def print_status(status: Status) -> None:
    """Print the runs, the stores and the notes to stdout."""
    out, now, root = console(), time.time(), Path(status.root)
    if not status.runs and not status.stores:
        out.print(printable(f"no runs and no stores below {root}"), soft_wrap=True)
    _print_rows(out, [_run_cells(run, root, now) for run in status.runs])
    _print_rows(out, [_store_cells(store, root, now) for store in status.stores])
    for note in status.notes:
        out.print(printable(f"kdpipe: {note}"), soft_wrap=True)


def _print_rows(out: Console, rows: Sequence[dict[str, str]]) -> None:
    """Print rows whose first cell is the name and whose second is the state."""
    from rich.padding import Padding
    from rich.text import Text

    table = new_table()
    headers = [header for header in (rows[0] if rows else ()) if any(row[header] for row in rows)]
    for header in headers:
        table.add_column(header, justify="right" if header in RIGHT_ALIGNED else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[header], style=_style(header, row)) for header in headers))
    if not rows or out.measure(table, options=out.options.update(width=10**6)).maximum <= out.width:
        out.print(table)
        return
    for row in rows:
        name, state, *others = headers
        details = "; ".join(f"{header} {row[header]}" for header in others if row[header])
        out.print(Text(row[name], style="bold"), soft_wrap=True)  # whole, for copying
        out.print(Padding(Text(row[state], style=_style("state", row)), (0, 0, 0, 4), expand=False))
        out.print(Padding(Text(details), (0, 0, 0, 4), expand=False))


def _style(header: str, row: dict[str, str]) -> str:
    if header == "state":
        return STYLES.get(row["state"], "red" if row["state"].startswith("failed") else "none")
    return "bold" if header in ("run", "store") else "none"


def _run_cells(run: RunStatus, root: Path, now: float) -> dict[str, str]:
    job = f"{run.stage}: {run.job}" if run.job else run.command
    is_over = run.state in {"done", "idle"}
    cells = {
        "run": name_in(run.path, root),
        "state": run.state,
        "job": "" if is_over and run.command != "python" else f"{job} ({run.who})" if run.who else job,
        "done": f"{100 * run.step // run.total} %" if run.step is not None and run.total and not is_over else "",
        "networks": f"{run.num_networks_done}/{run.num_networks}" if run.num_networks else "",
        "trials": _trials_text(run.trials),
        "rate": rate_text(run.rate_per_s, run.unit),
        "left": "" if run.eta_s is None else duration_text(run.eta_s),
        "last active": _ago(run.last_active, now),
        "size": size_text(run.disk_bytes),
        "test accuracy": ", ".join(f"{name} {accuracy:.2f} %" for name, accuracy in run.accuracies.items()),
    }
    return {header: printable(cell) for header, cell in cells.items()}


def _trials_text(trials: Mapping[str, int]) -> str:
    """Return the numbers of a search's trials, such as "9/40: 5 complete, 3 pruned, 1 running, best 7"."""
    counts = {name: count for name, count in trials.items() if name not in ("planned", "best") and count}
    begun = [f"{count} {'failed' if name == 'fail' else name}" for name, count in counts.items()]
    if not begun:
        return ""
    best = [f"best {trials['best']}"] if "best" in trials else []
    return f"{sum(counts.values())}/{trials.get('planned', '?')}: {', '.join([*begun, *best])}"


def _store_cells(store: StoreStatus, root: Path, now: float) -> dict[str, str]:
    num_more = len(store.at_work) - MAX_WORKERS
    cells = {
        "store": name_in(store.path, root),
        "state": store.state,
        "teacher": f"{store.teacher} on {store.data}" if store.data else store.teacher,
        "content": f"{store.num_samples:,} x {store.num_views} views" if store.num_views else "",
        "units": f"{store.num_units_done:,}/{store.num_units:,}" if store.num_units else "",
        "at work": "; ".join(store.at_work[:MAX_WORKERS]) + (f" and {num_more} more" if num_more > 0 else ""),
        "last active": _ago(store.last_active, now),
        "size": size_text(store.disk_bytes),
    }
    return {header: printable(cell) for header, cell in cells.items()}


def name_in(path: str, root: Path) -> str:
    """Return a path relative to the folder that was searched."""
    folder = Path(path)
    return str(folder.relative_to(root)) if folder != root else str(root) if root.name else root.resolve().name


def _ago(last_active: float, now: float) -> str:
    return f"{duration_text(now - last_active)} ago" if last_active > 0 else ""


def size_text(num_bytes: int) -> str:
    """Return a number of bytes in the largest unit that it fills."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
