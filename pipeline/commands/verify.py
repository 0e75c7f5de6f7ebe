"""Verify all files of a run folder, and its stores. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from kdpipe.pipeline.session.signals import handle_signals
from kdpipe.pipeline.terminal.exit_codes import DONE_IN_PART, FAILED
from kdpipe.pipeline.terminal.output import console, new_table, printable
from kdpipe.pipeline.terminal.progress import reporter
from kdpipe.stages.errors import RunError
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.open import stores_beside
from kdpipe.stages.workspace import store_of_run
from kdpipe.store import LockedError
from kdpipe.store.check.verify import VerifyReport, verify_store
from kdpipe.store.fs.checksums import SUMS, DamagedFileError, damages, read_sums
from kdpipe.store.fs.lock import lock_holder

STORE = "zarr.json"
"""The file that every store has."""

OF_JOBS = ("job.json", "result.json", "metrics.jsonl", "model.safetensors", "model.onnx")
"""The files of a job that have sums, except those that an older kdpipe wrote."""


@dataclass(frozen=True)
class RunVerifyReport:
    """Result of `verify_run`.

    Attributes:
        damaged: The files that are not as they were written: path, what is wrong, and what to do.
        unchecked: Files without a sum, which an older kdpipe wrote.
        stores: The verdict on each store in the run folder, and on those of another run that it uses, by its path.
        num_files: The files that have a sum.
    """

    damaged: tuple[DamagedFileError, ...]
    unchecked: tuple[Path, ...]
    stores: dict[Path, VerifyReport]
    num_files: int

    @property
    def is_damaged(self) -> bool:
        """Whether a file of the run or of a store is damaged."""
        return bool(self.damaged) or any(store.damaged for store in self.stores.values())

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged, and the stores are complete."""
        return not self.damaged and all(store.ok for store in self.stores.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "damaged": [{"file": str(one.path), "what": one.why, "advice": one.advice} for one in self.damaged],
            "unchecked": [str(path) for path in self.unchecked],
            "stores": {str(path): verdict.to_json() for path, verdict in self.stores.items()},
            "num_files": self.num_files,
        }


def verify_run(
    run: Path, on_unit: Callable[[int, int], None] = lambda done, total: None, *, with_stores: bool = True
) -> RunVerifyReport:
    """Check every file of a run that has a sum, and every byte of the stores that it uses; collect all damage.

    Args:
        run: The run folder.
        on_unit: Called with (units checked, units in all) of each store; may raise to stop.
        with_stores: Whether to check the stores too, which takes longest.

    Raises:
        RunError: There is no run folder.
        LockedError: A job is writing into it.
    """
    folders = dict(_folders(run)) if run.is_dir() else {}
    if run not in folders or not any({"recipe.json", SUMS, STORE} & names for names in folders.values()):
        raise RunError(f"{run} is neither a run folder nor a store: name the folder that `kdpipe run` prints.")
    if holder := lock_holder(run / ".kdpipe.lock"):
        raise LockedError(f"{run} is in use by {holder}; wait for it, or stop it first.")
    stores = [folder for folder, names in folders.items() if STORE in names]
    stores += [store for store in _used_stores(run) if (store / STORE).exists()]
    own = [folder for folder in folders if folder not in stores]
    found = [damage for folder in own for damage in damages(folder)]
    is_readable = {folder: folder / SUMS not in {damage.path for damage in found} for folder in own}
    listed = {folder: set(read_sums(folder)) if is_readable[folder] else set(OF_JOBS) for folder in own}
    return RunVerifyReport(
        damaged=tuple(found),
        unchecked=tuple(
            folder / name for folder in own for name in OF_JOBS if name in folders[folder] - listed[folder]
        ),
        stores={store: verify_store(store, on_unit) for store in stores if with_stores},
        num_files=sum(map(len, listed.values())),
    )


def _used_stores(run: Path) -> list[Path]:
    """Return the stores of another run that a run uses."""
    used = store_of_run(run)
    return [] if used.is_relative_to(run.absolute()) else stores_beside(used)


def _folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield the folders below `root` with the names of their files, without those inside stores."""
    for place, names, files in os.walk(root):
        folder = Path(place)
        yield folder, set(files)
        names[:] = [] if STORE in files else sorted(names)


def verify(run: Path, as_json: bool) -> RunVerifyReport:
    """Check a run, with signals and progress."""
    with handle_signals() as should_stop, reporter(as_json) as report:
        return verify_run(run, RunMonitor(report, should_stop).counter("verify", "check", "unit"))


def print_verdict(run: Path, verdict: RunVerifyReport) -> None:
    """Print a table of what is damaged, and a summary, to stdout."""
    rows = [(str(one.path), one.why, one.advice) for one in verdict.damaged]
    for path, store in verdict.stores.items():
        rows += [(str(path / fault.key), fault.what, "Run `kdpipe store repair RECIPE`.") for fault in store.damaged]
    screen = console()
    if rows:
        table = new_table(show_lines=True)
        for heading in ("damaged file", "what is wrong", "what to do"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        screen.print(table)
    num_bytes = sum(store.num_bytes for store in verdict.stores.values())
    summary = f"{run}: {verdict.num_files} files and {num_bytes:,} bytes of {len(verdict.stores)} stores were checked, "
    summary += f"{len(rows)} damaged" if rows else "nothing is damaged"
    if verdict.unchecked:
        summary += f"; {len(verdict.unchecked)} files have no sum, because an older kdpipe wrote them"
    if num_missing := sum(len(store.missing) for store in verdict.stores.values()):
        summary += f"; {num_missing} units of stores are not computed yet"
    print(printable(summary))  # noqa: T201


def exit_for(verdict: RunVerifyReport) -> None:
    """Exit with status 1 if anything is damaged, 3 if units of a store are missing; else return."""
    if verdict.is_damaged:
        raise typer.Exit(FAILED)
    if not verdict.ok:
        raise typer.Exit(DONE_IN_PART)
