"""`kdpipe status DIR`: every run and every store below a folder, and how each stands. Reads, and never writes.

It answers at once: nothing heavy is imported, and so much is looked at and no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.status.files import Budget, Measure, is_folder, locked
from pipeline.status.runs import RunStatus, is_run, run_status
from pipeline.status.stores import StoreStatus, manifest_of, store_status
from pipeline.terminal.output import printable
from stages.errors import RunError

MOST_DEPTH = 8
"""So many folders below the given one are looked into."""

MOST_ENTRIES = 100_000
MOST_IN_FOLDER = 5_000
"""So many entries of a folder that is no run are looked at: one with more holds pictures."""


@dataclass(frozen=True)
class Status:
    """What is below the folder `root`, what was heard of last first; notes: sentences on what could not be read."""

    root: str
    runs: list[RunStatus] = field(default_factory=list)
    stores: list[StoreStatus] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """With each run's and store's moment of its last sign of life as seconds since 1970."""
        return {"command": "status", **asdict(self)}


def read_status(root: Path) -> Status:
    """Look below `root`, or at it where it is a run or a store itself. Links are not followed, nor hidden folders
    looked into. Raises RunError where there is no such folder; folders that cannot be read are named in the notes.
    """
    if not root.is_dir():
        raise RunError(f"{root} is not a folder: name one in which runs or stores lie.")
    locked.cache_clear()
    budget = Budget(MOST_ENTRIES)
    runs: dict[Path, Measure] = {}
    stores = [store_status(folder, manifest, budget) for folder, manifest in _search(root, budget, runs)]
    notes = [f"not looked into: {sentence}" for sentence in budget.unread]
    if budget.left <= 0:
        notes.append(
            f"more than {MOST_ENTRIES:,} files: not all was looked at, and sizes are too small; "
            "name a folder further down."
        )
    found = [run_status(folder, held, budget) for folder, held in runs.items()]
    return Status(
        root=str(root),
        runs=sorted(found, key=lambda run: (-run.last_sign, run.path)),
        stores=sorted(stores, key=lambda store: (-store.last_sign, store.path)),
        notes=notes,
    )


def _search(root: Path, budget: Budget, runs: dict[Path, Measure]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The stores below `root`; runs are put into `runs`, with the measure of what is theirs. Nearest first."""
    waiting: deque[tuple[Path, int, Measure | None]] = deque([(root, 0, None)])
    while waiting and budget.left > 0:
        folder, depth, owner = waiting.popleft()
        entries = budget.entries(folder, MOST_IN_FOLDER if owner is None else None)
        names = {entry.name for entry in entries}
        manifest = manifest_of(folder, names)
        if manifest is not None:
            yield folder, manifest
            continue
        if is_run(folder, names):
            owner = runs[folder] = Measure()
        for entry in entries:
            if not is_folder(entry):
                if owner is not None:
                    owner.add(entry)
            elif depth < MOST_DEPTH and not entry.name.startswith("."):
                waiting.append((folder / entry.name, depth + 1, owner))


def print_status(status: Status) -> None:
    """For people, on stdout: two tables; on a narrow terminal two lines each."""
    from pipeline.status.table import print_tables

    print_tables(status)
    for note in status.notes:
        print(printable(f"kdpipe: {note}"))  # noqa: T201
