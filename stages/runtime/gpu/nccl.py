"""Groups of processes that send GPU tensors to each other: over NCCL, or over gloo where they share a GPU.

NCCL's start blocks until all processes take part. It runs in a thread, while each process watches for what the others
report: a start that fails in one process is named in all, and holds none up.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kdpipe.stages.errors import RecipeError, RunError

BACKEND = "KDPIPE_DIST_BACKEND"
"""The variable that names how GPU tensors are sent: nccl, or gloo, for several processes on one GPU."""

NCCL_TIMEOUT = timedelta(minutes=30)
"""The time that a process may wait for another one's GPU. Waits for the first process's work alone are over gloo."""

START_TIMEOUT_S = 600.0
"""The time that processes wait for each other's NCCL."""

POLL_S = 0.05
FAREWELL_S = 5.0
"""The time for the others to read of a failure, before the process that has their store ends."""

ADVICE = (
    f"NCCL_DEBUG=INFO prints its log; {BACKEND}=gloo does without NCCL, more slowly, and lets processes share a GPU."
)

_starts = itertools.count()
"""Numbers of the starts, the same in all processes, for the keys of what they report."""


def gpu_backend(environ: Mapping[str, str]) -> str:
    """Return the backend for GPU tensors. Raises RecipeError for one that is not known."""
    backend = environ.get(BACKEND) or "nccl"
    if backend not in ("nccl", "gloo"):
        raise RecipeError(f"{BACKEND} is {backend!r:.40}: set it to 'nccl', which is the default, or to 'gloo'.")
    return backend


def require_own_gpus(device: torch.device) -> None:
    """Raise RecipeError if two processes use the same GPU: NCCL does not connect a GPU with itself."""
    rank, count, gpu = dist.get_rank(), dist.get_world_size(), torch.cuda.get_device_properties(device)
    # For an instance of a divided GPU some versions of CUDA give the UUID of the whole.
    name = f"{socket.gethostname()} {gpu.uuid} {device.index or 0} {rank if ' MIG ' in gpu.name else ''}"
    own = torch.frombuffer(bytearray(hashlib.sha256(name.encode()).digest()[:8]), dtype=torch.int64)
    everyone = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(everyone, own)
    numbers = [int(one) for one in everyone]
    shared = [str(one) for one in range(count) if numbers.count(numbers[one]) > 1]
    if shared:
        raise RecipeError(
            f"processes {', '.join(shared)} of {count} use the same GPU, which NCCL refuses: start one process for "
            f"each GPU, or set {BACKEND}=gloo in their environment, which is slower."
        )


def nccl_groups(device: torch.device, count: int) -> list[Any]:
    """Return new groups of all processes over NCCL, started. Raises RunError in all of them if one cannot start it."""
    groups: list[Any] = []

    def start() -> None:
        torch.cuda.set_device(device)
        for _ in range(count):
            groups.append(dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT))
            dist.all_reduce(torch.ones(1, device=device), group=groups[-1])
            torch.cuda.synchronize(device)

    failed = _start_together(start)
    if failed is not None:
        raise RunError(
            f"NCCL, which connects the GPUs of the {dist.get_world_size()} processes, did not start {failed}: {ADVICE}"
        )
    return groups


def keep(value: Any) -> None:
    """Keep an object to the end of the process, also while Python shuts down: its destructor would wait for others."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def words_of(error: BaseException) -> str:
    """Return what an error of NCCL or gloo says, in one line, without places in torch's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"NCCL error in: \S+,|\[/\S+:\d+\]", "", " ".join(lines))
    return re.sub(r"\s+", " ", text).strip()[:300] or type(error).__name__


def _start_together(start: Callable[[], None]) -> str | None:
    """Run `start` in all processes at once; returns where it failed first and what it said, None if it did nowhere."""
    store, rank, count = dist.distributed_c10d._get_default_store().clone(), dist.get_rank(), dist.get_world_size()
    failed, done, read = (f"kdpipe/start/{next(_starts)}/{name}" for name in ("failed", "done", "read"))

    def run() -> None:
        own = store.clone()
        with suppress(RuntimeError):  # the first process, which has the store, may have ended
            try:
                start()
            except Exception as error:
                own.compare_set(failed, "", f"in process {rank} ({words_of(error)})")  # only the first of all
            else:
                own.add(done, 1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while store.add(done, 0) < count:
        found = store.check([failed])
        if found or time.monotonic() > deadline:
            where = store.get(failed).decode(errors="replace") if found else f"in all within {START_TIMEOUT_S:.0f} s"
            _let_all_read(store, read, rank, count)
            _give_up(thread, store)
            return where
        time.sleep(POLL_S)
    return None


def _let_all_read(store: Any, key: str, rank: int, count: int) -> None:
    """Wait in the first process until all know of a failure: its end is the end of their store."""
    store.add(key, 1)
    deadline = time.monotonic() + FAREWELL_S
    while rank == 0 and store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _give_up(thread: threading.Thread, store: Any) -> None:
    """Let a thread end that waits for others; if it does not, see to it that nothing wakes it while Python shuts down.

    A thread that wakes then ends the process by SIGABRT. Others may be woken by the end of the store, thus it stays.
    """
    thread.join(FAREWELL_S)
    if thread.is_alive():
        keep(store)
