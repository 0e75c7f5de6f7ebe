"""Find every run and store below a folder, with its status. Reads a bounded number of files, and writes nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdpipe.pipeline.status.files import Budget, Measure, is_folder
from kdpipe.pipeline.status.runs import is_run, run_status
from kdpipe.pipeline.status.stores import manifest_of, store_status
from kdpipe.pipeline.status.table import Status
from kdpipe.stages.errors import RunError

MAX_DEPTH = 8
MAX_ENTRIES = 100_000
MAX_IN_FOLDER = 5_000
"""Entries read of a folder that is not a run: one with more contains images."""


def read_status(root: Path) -> Status:
    """Return the status of all runs and stores below `root`, or of `root` itself.

    Links and hidden folders are not followed; folders that cannot be read are listed in the notes.
    """
    if not root.is_dir():
        raise RunError(f"{root} is not a folder: name one that contains runs or stores.")
    budget = Budget(MAX_ENTRIES)
    run_sizes: dict[Path, Measure] = {}
    stores = [store_status(folder, manifest, budget) for folder, manifest in _search(root, budget, run_sizes)]
    notes = [f"cannot read {sentence}" for sentence in budget.unread]
    if budget.left <= 0:
        notes.append(
            f"more than {MAX_ENTRIES:,} files: the search is incomplete, and sizes are too small; name a subfolder."
        )
    runs = [run_status(folder, size, budget) for folder, size in run_sizes.items()]
    return Status(
        root=str(root),
        runs=sorted(runs, key=lambda run: (-run.last_active, run.path)),
        stores=sorted(stores, key=lambda store: (-store.last_active, store.path)),
        notes=notes,
    )


def _search(root: Path, budget: Budget, run_sizes: dict[Path, Measure]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the stores below `root`, breadth first; put the size of each run, without its stores, into `run_sizes`."""
    queue: deque[tuple[Path, int, Measure | None]] = deque([(root, 0, None)])
    while queue and budget.left > 0:
        folder, depth, run_size = queue.popleft()
        entries = budget.entries(folder, MAX_IN_FOLDER if run_size is None else None)
        names = {entry.name for entry in entries}
        manifest = manifest_of(folder, names)
        if manifest is not None:
            yield folder, manifest
            continue
        if is_run(folder, names):
            run_size = run_sizes[folder] = Measure()
        for entry in entries:
            if not is_folder(entry):
                if run_size is not None:
                    run_size.add(entry)
            elif depth < MAX_DEPTH and not entry.name.startswith("."):
                queue.append((folder / entry.name, depth + 1, run_size))
