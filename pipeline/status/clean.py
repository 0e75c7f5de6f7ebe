"""`kdpipe clean`: show the stores of a workspace with the runs that use them, and remove what no run needs."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe.pipeline.status.files import Budget, Measure, measure
from kdpipe.pipeline.status.table import name_in, size_text
from kdpipe.pipeline.terminal.output import console, new_table, print_warning, printable
from kdpipe.stages.errors import RunError
from kdpipe.stages.targets.open import stores_beside
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.workspace import RECIPE, Workspace, run_folders, shown, store_of_run
from kdpipe.store import KdpipeError, exclusive
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX
from kdpipe.store.fs.checksums import read_intact_json, remove_with_sum
from kdpipe.store.fs.lock import lock_holder

MAX_FILES = 1_000_000
"""Files of a store that are measured."""

MAX_DEPTH = 5
"""Levels of folders that are searched for runs: a run that is not found would lose its store."""

LOCK = ".kdpipe.lock"


@dataclass(frozen=True)
class Entry:
    """A store, or what a job left behind.

    Attributes:
        what: store, checkpoint (of a finished job) or leftover (of a killed writer).
        run: The run folder that it is in.
        used_by: The run folders that refer to a store.
        is_needed: Whether it stays.
        is_removed: Whether it was removed.
    """

    path: str
    what: str
    run: str
    num_bytes: int
    used_by: tuple[str, ...] = ()
    is_needed: bool = False
    is_removed: bool = False


def clean(folder: Path, *, remove: bool) -> list[Entry]:
    """Return the stores and leftovers of the runs in `folder`; remove those that no run needs if `remove` is set.

    Nothing is removed from a run at which a job works, and no store while a job works at any.

    Raises:
        RunError: There is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder: name one that contains runs.")
    folder = folder.absolute()
    with Workspace(folder).unchanged():  # no run begins to use another store meanwhile
        runs = [*([folder] if (folder / RECIPE).exists() else []), *run_folders(folder, MAX_DEPTH)]
        found = [*_stores(runs), *(entry for run in runs for entry in _leftovers(run))]
        busy = [run for run in runs if lock_holder(run / LOCK)]
        if remove and busy:
            print_warning(f"a job works at {shown(busy[0])}: no store is removed now.")
        return [_removed(entry) if remove and not _is_kept(entry, busy) else entry for entry in found]


def _is_kept(entry: Entry, busy: list[Path]) -> bool:
    return entry.is_needed or (bool(busy) if entry.what == "store" else Path(entry.run) in busy)


def _stores(runs: list[Path]) -> Iterator[Entry]:
    recipes = {run: read_intact_json(run / RECIPE) for run in runs}
    unknown = [run for run, recipe in recipes.items() if recipe is None]
    if unknown:
        print_warning(f"{shown(unknown[0] / RECIPE)} cannot be read, and may name any store: all of them stay.")
    named = {run: set(_texts(recipe)) for run, recipe in recipes.items()}
    for run in runs:
        found = sorted(run.glob("*.zarr"))
        beside = {own for path in found for own in stores_beside(path)[1:]}
        for path in found:
            if path in beside or not path.is_dir() or path.is_symlink():
                continue
            name = f"{run.name}/{path.name}"  # recipes may name it relative to any folder
            users = [one for one in runs if any(text.rstrip("/").endswith(name) for text in named[one])]
            if store_of_run(run) == path and run not in users:
                users.insert(0, run)
            size, used_by = sum(map(_size, stores_beside(path))), tuple(map(str, users))
            yield Entry(str(path), "store", str(run), size, used_by, is_needed=bool(users or unknown))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _leftovers(run: Path) -> Iterator[Entry]:
    for path in sorted(run.rglob(f".*{PARTIAL_SUFFIX}")):
        yield Entry(str(path), "leftover", str(run), _size(path))
    for path in sorted(run.rglob("checkpoint.safetensors")):
        if (path.parent / "result.json").exists():
            yield Entry(str(path), "checkpoint", str(run), _size(path))


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else measure(path, Budget(MAX_FILES), Measure()).num_bytes
    return 0


def _removed(entry: Entry) -> Entry:
    """Remove it, unless a job has its run's lock by now."""
    path, run = Path(entry.path), Path(entry.run)
    try:
        with exclusive(run, run / LOCK):
            if entry.what == "checkpoint":
                remove_with_sum(JobDir(path.parent).checkpoint)
            for one in stores_beside(path) if entry.what == "store" else (path,):
                if one.is_dir():
                    gone = one.with_name(f".{one.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
                    shutil.rmtree(one.rename(gone))
                else:
                    one.unlink(missing_ok=True)
    except (KdpipeError, OSError) as error:
        print_warning(f"{shown(path)} is not removed: {error}")
        return entry
    return replace(entry, is_removed=True)


def clean_json(folder: Path, entries: list[Entry]) -> dict[str, Any]:
    """Return the entries for `--json`."""
    return {"command": "clean", "workspace": str(folder), "entries": [asdict(entry) for entry in entries]}


def print_clean(folder: Path, entries: list[Entry]) -> None:
    """Print the entries and a summary to stdout."""
    table, root = new_table(), folder.absolute()
    for header in ("what", "path", "size", "used by"):
        table.add_column(header, overflow="fold", justify="right" if header == "size" else "left")
    for entry in entries:
        users = ", ".join(name_in(user, root) for user in entry.used_by) or (
            "removed" if entry.is_removed else "no run"
        )
        table.add_row(*map(printable, (entry.what, name_in(entry.path, root), size_text(entry.num_bytes), users)))
    if entries:
        console().print(table)
    removed = sum(entry.num_bytes for entry in entries if entry.is_removed)
    left = sum(entry.num_bytes for entry in entries if not (entry.is_needed or entry.is_removed))
    told = [f"{size_text(removed)} removed"] * bool(removed)
    told += [f"{size_text(left)} can be removed: kdpipe clean {folder} --remove"] * bool(left)
    print(printable(f"{folder}: {'; '.join(told) or 'nothing can be removed'}"))  # noqa: T201
