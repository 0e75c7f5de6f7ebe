"""Write `run.json` in a run folder: which recipe, kdpipe version and machine produced its content, and the time taken.

{"recipe": resolved, "fingerprints": {...}, "sessions": [one per process, oldest first]}. The recipe is that of the last
session that produced something. A session is written when it begins, so a killed one is visible by
`ended` = null. Write errors are reported once and do not end the job.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.recipe.load import RUN_FILES_LOCK
from kdpipe.pipeline.session.event_log import job_id
from kdpipe.pipeline.terminal.exit_codes import DONE, DONE_IN_PART, STOPPED_EARLY, process_exit_code
from kdpipe.pipeline.terminal.output import print_debug, print_warning
from kdpipe.pipeline.terminal.reporter import json_text, utc_now
from kdpipe.stages.runtime.versions import commit, versions
from kdpipe.store.errors import KdpipeError
from kdpipe.store.fs.checksums import DamagedFileError, read_intact_json, require_intact, write_with_sum
from kdpipe.store.fs.lock import exclusive
from kdpipe.store.fs.safe_read import read_json
from kdpipe.store.redact import redacted_options

if TYPE_CHECKING:
    from kdpipe.pipeline.run import Run

RUN = "run.json"
DAMAGED = ".damaged"
MAX_SESSIONS = 500
"""Number of sessions kept; the oldest are removed first."""

PRODUCTIVE = (DONE, DONE_IN_PART, STOPPED_EARLY)
"""Exit codes of sessions that produced something; the file then shows their recipe."""

MAX_BYTES = 64 * 2**20


class Session:
    """The record of one process in a run folder."""

    def __init__(self, folder: Path, record: dict[str, Any], common: dict[str, Any]) -> None:
        self._folder = folder
        self._record = record
        self._common = common
        self._started = time.monotonic()
        self._has_warned = self._has_produced = False

    def note(self, *, fingerprints: Mapping[str, str] | None = None, **fields: Any) -> None:
        """Record `fingerprints`, by name, for the run; and other fields for the session."""
        self._common["fingerprints"] |= fingerprints or {}
        self._record |= fields

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the phase `name`; blocks may be nested."""
        started = time.monotonic()
        try:
            yield
        finally:
            wall_s = time.monotonic() - started
            phases = self._record["phases"]
            phases[name] = round(phases.get(name, 0.0) + wall_s, 3)
            print_debug(f"{name}: {wall_s:.1f} s")

    def end(self, code: int) -> None:
        """Record the exit status, wall time and peak memory. Does nothing in a forked child."""
        if os.getpid() != self._record["pid"]:
            return
        self._has_produced |= code in PRODUCTIVE
        self._record |= {
            "ended": utc_now(),
            "exit_code": code,
            "wall_s": round(time.monotonic() - self._started, 3),
            **peak_memory(),
        }
        self.write()

    def write(self) -> None:
        """Update this session in the file; those of other processes stay as they are."""
        try:
            with exclusive(self._folder, self._folder / RUN_FILES_LOCK, wait=True):
                stored = self._stored()
                write_with_sum(self._folder / RUN, (json_text(self._merged(stored), indent=1) + "\n").encode())
        except (OSError, KdpipeError) as error:
            if not self._has_warned:
                self._has_warned = True
                print_warning(f"{self._folder / RUN} cannot be written ({error}); the job goes on.")

    def _stored(self) -> dict[str, Any]:
        """Return the content of the file; a damaged one is kept under another name, and a new one begun."""
        path = self._folder / RUN
        try:
            require_intact(path)
            return read_json(path, MAX_BYTES)
        except FileNotFoundError:
            return {}
        except KdpipeError as error:
            if isinstance(error, DamagedFileError) and error.path != path:
                raise
            print_warning(f"{error} It is kept as {path.name}{DAMAGED}, and a new one is begun.")
            path.replace(path.with_name(path.name + DAMAGED))
            return {}

    def _merged(self, stored: dict[str, Any]) -> dict[str, Any]:
        known, number = stored.get("sessions"), self._record["id"]
        sessions = [item for item in known if isinstance(item, dict)] if isinstance(known, list) else []
        if all(item.get("id") != number for item in sessions):
            sessions.append(self._record)
        sessions = [self._record if item.get("id") == number else item for item in sessions][-MAX_SESSIONS:]
        fingerprints = stored.get("fingerprints")
        before = fingerprints if isinstance(fingerprints, dict) else {}
        # A refused command must not change what the file says about the run.
        common = self._common if self._has_produced else {**self._common, **stored}
        return {**common, "fingerprints": before | self._common["fingerprints"], "sessions": sessions}


@contextmanager
def session(folder: Path, command: str, recipe: Mapping[str, Any], *, argv: Sequence[str]) -> Iterator[Session]:
    """Record this process in the run folder `folder`, which must exist. File errors never raise.

    `recipe` is the resolved recipe as JSON. The exit status is that of the exception that leaves the block, else 0.
    """
    common = {"recipe": dict(recipe), "fingerprints": {}}
    own = Session(folder, _record(command, argv), common)
    own.write()
    try:
        yield own
    except BaseException as error:
        own.end(process_exit_code(error))
        raise
    else:
        own.end(0)


def _record(command: str, argv: Sequence[str]) -> dict[str, Any]:
    head, dirty = commit()
    processes = next((os.environ[name] for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") if name in os.environ), "1")
    return {
        "id": uuid.uuid4().hex,
        "command": command,
        "argv": redacted_options(list(argv)),
        "commit": head,
        "dirty": dirty,
        "versions": {name: version for name, version in versions().items() if version is not None},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": job_id(),
        "device": None,
        "processes": int(processes) if processes.isdecimal() and len(processes) < 10 else None,
        "started": utc_now(),
        "ended": None,
        "exit_code": None,
        "wall_s": None,
        "phases": {},
        "peak_memory_bytes": None,
        "peak_gpu_memory_bytes": None,
    }


def peak_memory() -> dict[str, int | None]:
    """Return the peak memory, in bytes, of this process or of any ended child, and of its GPUs as torch counts it."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit
    return {"peak_memory_bytes": peak, "peak_gpu_memory_bytes": _peak_gpu_memory()}


def _peak_gpu_memory() -> int | None:
    torch = sys.modules.get("torch")  # do not import it just for this
    cuda: Any = getattr(torch, "cuda", None)
    try:
        if cuda is None or not cuda.is_initialized():
            return None
        return sum(int(cuda.max_memory_allocated(number)) for number in range(cuda.device_count()))
    except (RuntimeError, AttributeError, ValueError):  # the GPU itself may have failed
        return None


def fingerprints(run: Run) -> dict[str, str]:
    """Return the sha256 of the weights of each finished network, and the fingerprint of each store, by name.

    Missing or unreadable ones are left out.
    """
    from kdpipe.store import is_url, read_store_manifest

    found: dict[str, str] = {}
    for result in sorted(run.folder.glob("**/result.json")):
        identity = (read_intact_json(result) or {}).get("identity")
        sha256 = identity.get("weights_sha256") if isinstance(identity, dict) else None
        if isinstance(sha256, str):
            found[str(result.parent.relative_to(run.folder))] = sha256
    with suppress(KdpipeError):
        for store in map(Path, (path for path in (run.store, *run.stores) if not is_url(str(path)))):
            with suppress(KdpipeError):
                found[store.name] = read_store_manifest(store).identity.fingerprint
    return found
