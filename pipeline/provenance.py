"""`run.json` in a run folder: who made what is there, from which recipe, with which kdpipe, on which machine, how long.

{"recipe": resolved, "seeds": {...}, "fingerprints": {...}, "sessions": [one a process, the oldest first]}. The recipe
is that of the last session that made something. A session is
written down when it begins, so that one that was killed is known: its `ended` stays null. Never in the way of a job:
what the disk refuses is told once.
"""

from __future__ import annotations

import json
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
from typing import Any

from pipeline.events import exit_code_of, json_text, utc_now
from pipeline.exit_codes import DONE, DONE_IN_PART, STOPPED_EARLY
from stages.machine.versions import commit, versions
from store.durable import write_atomically
from store.errors import KdpipeError
from store.lock import JOB_ID_VARIABLES, exclusive
from store.plain_file import read_plain

RUN = "run.json"
LOCK = ".run.json.lock"
FIRST_KEPT, LAST_KEPT = 100, 400
"""Of a run that was begun more often, the sessions between these are forgotten."""

MADE = (DONE, DONE_IN_PART, STOPPED_EARLY)
"""With these a session has made something from its recipe, which then stands in the file."""

MOST_BYTES = 64 * 2**20


class Session:
    """One process's part in a run folder."""

    def __init__(self, folder: Path, record: dict[str, Any], common: dict[str, Any]) -> None:
        self._folder = folder
        self._record = record
        self._common = common
        self._began = time.monotonic()
        self._has_told = self._has_made = False

    def note(self, *, fingerprints: Mapping[str, str] | None = None, **facts: Any) -> None:
        """Put down more: `fingerprints`, by what they are of, for the run; all else (`device`) for the session."""
        self._common["fingerprints"] |= fingerprints or {}
        self._record |= facts

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's wall time under `name`; of a block within a block, to both."""
        began = time.monotonic()
        try:
            yield
        finally:
            phases = self._record["phases"]
            phases[name] = round(phases.get(name, 0.0) + time.monotonic() - began, 3)

    def end(self, code: int) -> None:
        """Put down how it ended, and what it took. A forked child that gets here is no end of the session."""
        if os.getpid() != self._record["pid"]:
            return
        self._has_made |= code in MADE
        self._record |= {
            "ended": utc_now(),
            "exit_code": code,
            "wall_s": round(time.monotonic() - self._began, 3),
            **peak_memory(),
        }
        self.write()

    def write(self) -> None:
        """Bring the file up to date, this session's part of it alone: other processes have theirs there."""
        try:
            with exclusive(self._folder, self._folder / LOCK, wait=True):
                held = _read(self._folder / RUN)
                write_atomically(self._folder / RUN, (json_text(self._merged(held), indent=1) + "\n").encode())
        except (OSError, KdpipeError) as error:
            self._tell(str(error))

    def _merged(self, held: dict[str, Any]) -> dict[str, Any]:
        known = held.get("sessions")
        sessions = [one for one in known if isinstance(one, dict)] if isinstance(known, list) else []
        others = [one for one in sessions if one.get("id") != self._record["id"]]
        at = next((number for number, one in enumerate(sessions) if one not in others), len(others))
        sessions = [*others[:at], self._record, *others[at:]]
        if len(sessions) > FIRST_KEPT + LAST_KEPT:
            sessions = [*sessions[:FIRST_KEPT], *sessions[-LAST_KEPT:]]
        fingerprints = held.get("fingerprints")
        before = fingerprints if isinstance(fingerprints, dict) else {}
        # A refused command must not change what the folder says of itself.
        made_from = self._common if self._has_made else {**self._common, **held}
        return {**made_from, "fingerprints": before | self._common["fingerprints"], "sessions": sessions}

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._has_told = True
            with suppress(OSError, ValueError):
                print(f"kdpipe: warning: {self._folder / RUN} is not kept ({why}); the job goes on.", file=sys.stderr)  # noqa: T201


@contextmanager
def session(folder: Path, command: str, recipe: Mapping[str, Any], *, argv: Sequence[str]) -> Iterator[Session]:
    """This process's session in the run folder `folder`, which must exist; `recipe` is the resolved one, as JSON.

    argv: the arguments as they were given. The exit status is that of the exception that leaves the block, else 0.
    Never raises because of the file.
    """
    common = {"recipe": dict(recipe), "seeds": seeds_of(recipe), "fingerprints": {}}
    own = Session(folder, _record(command, argv), common)
    own.write()
    try:
        yield own
    except BaseException as error:
        own.end(exit_code_of(error))
        raise
    else:
        own.end(0)


def _record(command: str, argv: Sequence[str]) -> dict[str, Any]:
    head, dirty = commit()
    processes = next((os.environ[name] for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") if name in os.environ), "1")
    return {
        "id": uuid.uuid4().hex,
        "command": command,
        "argv": list(argv),
        "commit": head,
        "dirty": dirty,
        "versions": {name: version for name, version in versions().items() if version is not None},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": next((os.environ[name] for name in JOB_ID_VARIABLES if os.environ.get(name)), None),
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


def seeds_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The seeds that a resolved recipe names: of the teacher, of the views, of the students."""
    found: dict[str, Any] = {"recipe": recipe.get("seed")}
    for section, key in (("views", "seed"), ("student", "seeds")):
        held = recipe.get(section)
        found[section] = held.get(key) if isinstance(held, Mapping) else None
    return found


def peak_memory() -> dict[str, int | None]:
    """The most bytes that this process, or any child of it that has ended, had in memory; the same of its GPUs' memory
    as torch counts it, None without.
    """
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    in_kib = sys.platform != "darwin"
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) * (1024 if in_kib else 1)
    return {"peak_memory_bytes": peak, "peak_gpu_memory_bytes": _peak_gpu_memory()}


def _peak_gpu_memory() -> int | None:
    torch = sys.modules.get("torch")  # not imported only to be asked
    cuda: Any = getattr(torch, "cuda", None)
    try:
        if cuda is None or not cuda.is_initialized():
            return None
        return sum(int(cuda.max_memory_allocated(number)) for number in range(cuda.device_count()))
    except (RuntimeError, AttributeError, ValueError):  # the GPU is what ended the job
        return None


def _read(path: Path) -> dict[str, Any]:
    """What stands in the file; nothing where it is damaged: it is for people, and is begun afresh."""
    try:
        record = json.loads(read_plain(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
