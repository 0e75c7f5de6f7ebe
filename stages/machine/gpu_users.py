"""Who uses a GPU beside this job: its own processes, those that started it, and those that share its launcher do not
count.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.machine.gpus import Gpu, gib

UNSEEN_BYTES = 2**30
"""So much memory in use, of which no process is known, means one that this process may not see, as in a container.

An idle GPU has next to nothing in use, a desktop some hundred MiB; a CUDA context alone takes 300 to 600 MiB, so that
somebody who has only just begun may be overlooked.
"""

PROC = Path("/proc")


def user_of(gpu: Gpu, launched: bool, proc: Path = PROC) -> str | None:
    """Who else uses a GPU, in words; None where nobody does. launched: whether torchrun or srun started this process:
    then what these started beside it is the same job.
    """
    others = [process for process in gpu.processes if is_another(process.pid, launched, proc)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"{others[0]}{more}"
    if not gpu.processes and gpu.unseen_bytes > UNSEEN_BYTES:
        return f"a process that cannot be seen from here ({gib(gpu.unseen_bytes)} GiB of its memory are taken)"
    return None


def is_another(pid: int, launched: bool, proc: Path = PROC) -> bool:
    """Whether a process is no part of this job. One that has ended and waits to be reaped is nobody; one of which
    nothing is known, as outside of a container, is another.
    """
    own = os.getpid()
    above = _line(own, proc)
    family = {own, *above[1:2]} if launched else {own}
    return not (_is_dead(pid, proc) or pid in above or family & set(_line(pid, proc)))


def _line(pid: int, proc: Path) -> list[int]:
    """A process and those that it descends from, but for the first of all, from which everybody does."""
    line: list[int] = []
    while pid > 1 and pid not in line:
        line.append(pid)
        pid = int((_stat(pid, proc) or ["", "0"])[1])
    return line


def _is_dead(pid: int, proc: Path) -> bool:
    return (_stat(pid, proc) or [""])[0] in {"Z", "X"}


def _stat(pid: int, proc: Path) -> list[str] | None:
    """A process's state, its parent, and what else Linux says behind its name; None where there is none."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # names may hold brackets and spaces
