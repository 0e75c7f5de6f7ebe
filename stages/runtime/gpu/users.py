"""Other users of a GPU: processes that are not part of this job."""

from __future__ import annotations

import os

import psutil

from kdpipe.stages.runtime.gpu.nvml import Gpu, gib

UNSEEN_BYTES = 2**30
"""More memory in use than this, without a known process, means one that is not visible, as in a container.

An idle GPU has next to nothing in use, a desktop some hundred MiB; a CUDA context alone takes 300 to 600 MiB, so that a
process that has only just started may be overlooked.
"""


def gpu_user(gpu: Gpu, launched: bool) -> str | None:
    """Describe who else uses a GPU; None where it is idle.

    If this process was `launched` by torchrun or srun, other processes of the launcher are the same job.
    """
    others = [process for process in gpu.processes if is_foreign(process.pid, launched)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"{others[0]}{more}"
    if not gpu.processes and gpu.unseen_bytes > UNSEEN_BYTES:
        return f"a process that is not visible from here ({gib(gpu.unseen_bytes)} GiB of its memory are in use)"
    return None


def is_foreign(pid: int, launched: bool) -> bool:
    """Return whether a process is not part of this job.

    Ancestors and descendants of this process are part of it, zombies are ignored; a process of which nothing is known,
    such as one outside of a container, is foreign.
    """
    ancestors = _lineage(os.getpid())[1:]
    family = {os.getpid(), *ancestors[:1]} if launched else {os.getpid()}
    return not (_is_dead(pid) or pid in ancestors or family & set(_lineage(pid)))


def _lineage(pid: int) -> list[int]:
    """Return a process and its ancestors, without process 1, from which all descend."""
    try:
        ancestors = [process.pid for process in psutil.Process(pid).parents()]
    except psutil.Error:
        ancestors = []
    return [one for one in (pid, *ancestors) if one > 1]


def _is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.Error:
        return False
