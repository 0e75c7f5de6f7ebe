"""Decode and render the images of coming batches in worker processes.

Workers ignore the job's signals, since the job needs them to finish its step; they die with it, even if it is killed.
Images come in shared memory, or through a pipe where that is too small (64 MB of /dev/shm in Docker); everything else
is numpy's, since torch would put each small tensor into shared memory as well.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdpipe.stages.data.decode import UnreadableImage
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.splits import Indices
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.views.global_rng import preserve_rng_state
from kdpipe.stages.views.renderer import Renderer

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_NO_ROOM = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

PR_SET_PDEATHSIG = 1
"""From Linux <sys/prctl.h>."""


@dataclass(frozen=True)
class WorkerTask:
    """The images that a worker renders for a batch.

    Attributes:
        view: The view; None means the original images.
        indices: Positions of the samples in the data set, int64 [B].
        rows: Rows of the batch that have a partner, int64 [M].
        partners: Positions of these partners in their data set, int64 [M].
    """

    view: int | None
    indices: Indices
    rows: Indices | None = None
    partners: Indices | None = None


class Failure(NamedTuple):
    """The reason why a sample has no image; `kind` is "image" for a fault of the file, else "data" or "recipe"."""

    sample_id: int
    why: str
    kind: str


class WorkerResult(NamedTuple):
    """The rendered images of a batch.

    Attributes:
        images: uint8 [K + L, C, H, W]: of the rows `kept`, then of the partners of those rows that have one.
        kept: Readable rows of the task, int64 [K].
        failures: The failures of the other rows.
    """

    images: Tensor
    kept: Tensor
    failures: list[Failure]


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the arguments of a DataLoader whose results stay as they are, and whose workers die with the job."""
    return {
        "num_workers": num_workers,
        "collate_fn": _identity,
        "worker_init_fn": _init_worker,
        "multiprocessing_context": "fork" if num_workers and sys.platform == "linux" else None,
        "generator": torch.Generator(),  # private: the job's random numbers must not change
    }


class PrefetchPool:
    """A pool of worker processes, started at the first stream and kept for later ones."""

    def __init__(
        self,
        image_set: ImageSet,
        mix_partners: ImageSet | None,
        renderer: Renderer | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._tasks = _Tasks()
        if renderer is not None:
            _ = renderer.shape  # raises for invalid views before any worker starts
        self._loader: DataLoader[Any] = DataLoader(
            _TaskDataset(image_set, mix_partners or image_set, renderer),
            batch_size=None,
            sampler=self._tasks,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            **worker_options(num_workers),
        )
        atexit.register(weakref.finalize(self, _end_workers, self._loader))

    def stream(self, tasks: Iterable[WorkerTask]) -> Iterator[WorkerResult]:
        """Yield the results in the order of the tasks, which are drawn ahead.

        Raises:
            RuntimeError: Another stream of this pool was started meanwhile, or a worker was killed.
            DataError: The machine has no room for workers.
        """
        self._tasks.current = tasks
        try:
            for images, kept, failures in self._results():
                yield WorkerResult(torch.as_tensor(images), torch.as_tensor(kept), failures)
                if self._tasks.current is not tasks:
                    raise RuntimeError("this stream cannot continue: another stream of the same pool was started.")
        finally:
            if self._tasks.current is tasks:
                self._tasks.current = ()  # the tasks may reference this pool and so keep its workers alive

    def _results(self) -> Iterator[Any]:
        try:
            if self._loader.num_workers:
                multiprocessing.Lock()  # of which torch needs many: fails here without leaving half an iterator
            with signals_blocked():
                results = iter(self._loader)
            yield from results
        except (EOFError, OSError, RuntimeError) as error:  # from a dying worker, before torch notices
            if _is_no_room(error):
                reason = getattr(error, "strerror", None) or str(error).partition(". ")[0]
                raise DataError(
                    f"processes that decode images cannot work ({reason}): /dev/shm is full, "
                    "or too many files are open. Give it more (docker run --shm-size=1g, ulimit -n 4096), or set "
                    "data.num_workers = 0."
                ) from error
            dead = [] if isinstance(error, RuntimeError) else _first_dead(_workers(self._loader))
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid {dead[0]}) was killed.") from error


def _is_no_room(error: Exception) -> bool:
    """Return whether shared memory or file descriptors ran out; torch raises RuntimeError for the latter."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM and error.filename is None
    return str(error).startswith("Too many open files")


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals while workers start: the job's signals must not end one before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _workers(loader: DataLoader[Any]) -> list[Any]:
    """Return the worker processes; none before the first stream."""
    return getattr(loader._iterator, "_workers", [])


def _first_dead(workers: list[Any]) -> list[int]:
    """Return the pids of the first workers to die within a second."""
    pids = {worker.sentinel: worker.pid for worker in workers}
    return [pids[sentinel] for sentinel in wait(list(pids), timeout=1)]


def _end_workers(loader: DataLoader[Any]) -> None:
    """End the workers: Python itself would wait for ever, since they ignore its SIGTERM."""
    if workers := _workers(loader):
        iterator: Any = loader._iterator
        with suppress(RuntimeError):  # a worker was killed, which torch has reported
            iterator._shutdown_workers()  # waits some seconds for each
        for worker in workers:
            if worker.is_alive():  # hangs reading a file
                worker.kill()


class _Tasks:
    """A sampler over the tasks of the current stream."""

    current: Iterable[WorkerTask] = ()

    def __iter__(self) -> Iterator[WorkerTask]:
        return iter(self.current)


class _TaskDataset(Dataset[Any]):
    """Renders tasks in a worker."""

    def __init__(self, image_set: ImageSet, mix_partners: ImageSet, renderer: Renderer | None) -> None:
        self._image_set, self._mix_partners, self._renderer = image_set, mix_partners, renderer

    def __getitem__(self, task: WorkerTask) -> tuple[Any, ...]:
        with preserve_rng_state():  # once a batch: rendering seeds them for each image
            images, kept, failures = self._render_task(task)
        return (images if get_worker_info() is None else _to_share(images)), np.array(kept, np.int64), failures

    def _render_task(self, task: WorkerTask) -> tuple[Tensor, list[int], list[Failure]]:
        failures: list[Failure] = []
        own = [self._render(self._image_set, index, task.view, failures) for index in task.indices.tolist()]
        partners: dict[int, Tensor | None] = {}
        if task.rows is not None and task.partners is not None:
            for row, index in zip(task.rows.tolist(), task.partners.tolist(), strict=True):
                partners[row] = self._render(self._mix_partners, index, task.view, failures)
        kept = [row for row, image in enumerate(own) if image is not None and partners.get(row, image) is not None]
        images = [own[row] for row in kept] + [partners[row] for row in kept if row in partners]
        stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)  # type: ignore[arg-type]
        return stacked, kept, failures

    def _render(self, image_set: ImageSet, index: int, view: int | None, failures: list[Failure]) -> Tensor | None:
        """Render one image; on an error return None and record the failure.

        Exceptions must not cross processes: they would arrive as tracebacks.
        """
        sample_id = int(image_set.sample_ids[index])
        try:
            pixels = image_set.read(index)
            if self._renderer is None or view is None:
                return torch.from_numpy(pixels)
            return self._renderer.render_image(pixels, sample_id, view)
        except (DataError, RecipeError) as error:
            is_image = isinstance(error, UnreadableImage)
            kind = "image" if is_image else "data" if isinstance(error, DataError) else "recipe"
            failures.append(Failure(sample_id, str(error), kind))
        return None


def _to_share(images: Tensor) -> Any:
    """Return the images in shared memory; as an array, which goes through a pipe, where there is no room for them."""
    try:
        get_temp_dir()  # of the socket by which shared memory is handed over
        # Here, since in the thread that sends it an error would only lose the batch.
        return images.share_memory_()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError):
        return images.numpy()


def _identity(result: Any) -> Any:
    return result


def _end(error: Exception, result: Any) -> None:
    """End a worker that cannot send a result, which the job would await for ever."""
    os._exit(1)


def _init_worker(number: int) -> None:
    """Ignore the job's signals, and die with it."""
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died in between
            os._exit(1)
