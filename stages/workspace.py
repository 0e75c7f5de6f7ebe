"""The workspace: the run folders that share teachers, stores and students."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import RunError
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.store import Claim, KdpipeError, claim, exclusive, is_url
from kdpipe.store.format.identity import sha256_of
from kdpipe.store.fs.checksums import read_intact_json

MAX_RUNS = 2000
"""Run folders that are looked at."""

MAX_ENTRIES = 5000
"""Entries read of a folder: one with more contains images."""

VARIABLE = "KDPIPE_WORKSPACE"

RECIPE = "recipe.json"
"""The file that every run folder has."""

PROBE_S = 0.1
"""Seconds between two looks at what another process is making."""


@dataclass(frozen=True)
class Workspace:
    """The folder whose run folders are looked at for what a run needs.

    Attributes:
        folder: The folder; None shares nothing.
        more: Other run folders that are looked at first.
    """

    folder: Path | None = None
    more: tuple[Path, ...] = ()

    def runs(self, own: Path) -> Iterator[Path]:
        """Yield the run folders but `own`: those in the workspace, and those in their subfolders, as of a sweep."""
        found = (path for path in (*self.more, *run_folders(self.folder)) if path.absolute() != own.absolute())
        yield from islice(dict.fromkeys(found), MAX_RUNS)

    def beside(self, *stores: str | None) -> Workspace:
        """Return the workspace with the run folders that hold these stores."""
        named = (Path(store).absolute().parent for store in stores if store and not is_url(store))
        return self if self.folder is None else replace(self, more=(*self.more, *named))

    @contextmanager
    def turn(
        self,
        stage: str,
        what: str,
        fingerprint: Mapping[str, Any],
        monitor: RunMonitor,
        process_group: ProcessGroup = SINGLE,
    ) -> Iterator[None]:
        """Keep other jobs of the workspace from making the same inside the block; wait while one does.

        Args:
            stage: The stage, for the message.
            what: What is made, for the message.
            fingerprint: All that determines it, as JSON.
            monitor: Its stop flag ends the waiting.
            process_group: The processes of this job, which all wait.
        """
        name, held = sha256_of({"stage": stage, "inputs": fingerprint}), list[Claim]()
        is_told = False
        while (other := process_group.on_main(partial(self._claim, name, held))) is not None:
            if not is_told and process_group.is_main:
                monitor.report(ProgressEvent(stage, f"waits for the {what} that {other} makes", 0, 1, "turn"))
                is_told = True
            process_group.check_stop(monitor)
            time.sleep(PROBE_S)
        try:
            yield
        finally:
            for claimed in held:
                claimed.release()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keep other processes from choosing or removing a store of the workspace inside the block."""
        with ExitStack() as lock:
            if self.folder is not None and os.access(self.folder, os.W_OK):
                with suppress(KdpipeError):
                    lock.enter_context(exclusive(self.folder, self.folder / ".workspace.lock", wait=True))
            yield

    def _claim(self, name: str, held: list[Claim]) -> str | None:
        """Add a claim to `held`, or return who holds it; no claim where nothing is shared, or no lock can be had."""
        if self.folder is None or not os.access(self.folder, os.W_OK):
            return None  # then work may be done twice
        with suppress(KdpipeError):
            found = claim(self.folder / "workspace", name)
            if not isinstance(found, Claim):
                return str(found)
            held.append(found)
        return None


NOWHERE = Workspace()
"""The workspace of a run that shares nothing."""


def workspace_of(run: Path, named: str | None) -> Workspace:
    """Return the workspace of a run: `named`, or the folder that the run folder is in; "none" shares nothing.

    Raises:
        RunError: There is no such folder.
    """
    if named == "none":
        return NOWHERE
    if named and not Path(named).is_dir():
        raise RunError(f"--workspace {named}: this is not a folder; name one that contains run folders, or none.")
    return Workspace((Path(named) if named else run.absolute().parent).absolute())


def store_of_run(folder: Path) -> Path:
    """Return the store that a run uses, as its recipe says: by default that in its folder."""
    record = read_intact_json(folder / RECIPE) or {}
    cache = record.get("cache")
    named = cache.get("store") if isinstance(cache, dict) else None
    return (Path(named) if isinstance(named, str) and not is_url(named) else folder / "store.zarr").absolute()


def shown(path: Path) -> str:
    """Return a path as short as possible, for messages: relative to the working folder if it is below it."""
    with suppress(ValueError, OSError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def run_folders(folder: Path | None, depth: int = 2) -> Iterator[Path]:
    """Yield the folders with a recipe below a folder, sorted by name, those deeper last."""
    below: list[Path] = []
    with suppress(OSError), os.scandir(folder or os.devnull) as entries:  # a folder that cannot be listed
        inside = islice(entries, MAX_ENTRIES)
        below = sorted(Path(one.path) for one in inside if one.is_dir() and not one.name.endswith(".zarr"))
    yield from (path for path in below if (path / RECIPE).exists())
    if depth > 1:
        for path in below:
            yield from run_folders(path, depth - 1)
