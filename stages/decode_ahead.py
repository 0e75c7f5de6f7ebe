"""Worker processes that decode and render the pictures of coming batches while the student is busy with this one.

Workers ignore the signals that are meant for the job, which finishes its step with their help; they die with it, even
when it is killed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.datasets.image_set import ImageSet
from stages.datasets.pixels import UnreadableImage
from stages.errors import DataError, RecipeError
from stages.views.global_generators import generators_kept
from stages.views.renderer import Renderer

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""


@dataclass(frozen=True)
class Ask:
    """What a worker is to render: samples of the data set at `positions`, int64 [B], in `view` (None: as they are),
    and, for those of them at `rows`, int64 [M], their partners, which stand at `partners`, int64 [M].
    """

    view: int | None
    positions: Tensor
    rows: Tensor | None = None
    partners: Tensor | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no picture of a sample. `kind` is "image" where that is the image file's own fault, else "data" or
    "recipe": whose fault it is.
    """

    sample_id: int
    why: str
    kind: str


@dataclass(frozen=True)
class Answer:
    """Pictures uint8 [K + L, C, H, W]: of the rows `kept`, int64 [K], of what was asked, then of the partners of those
    among them that have one.
    """

    images: Tensor
    kept: Tensor
    failures: tuple[Failure, ...]


class DecodeAhead:
    """A pool of worker processes, started at the first stream and kept for the next ones."""

    def __init__(
        self,
        image_set: ImageSet,
        partners: ImageSet | None,
        renderer: Renderer | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._asks = _Asks()
        if renderer is not None:
            _ = renderer.shape  # built, and refused if it must be, before any worker starts
        self._loader: DataLoader[Any] = DataLoader(
            _Work(image_set, partners or image_set, renderer),
            batch_size=None,
            sampler=self._asks,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_start,
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # its own: the job's random numbers are left alone
        )
        atexit.register(weakref.finalize(self, _end_workers, self._loader))

    def stream(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """The answers in the order of the asks, some of which are drawn ahead. Only one stream at a time: where another
        has begun, an older one raises RuntimeError, as does each where a worker was killed.
        """
        self._asks.current = asks
        try:
            for images, kept, failures in self._answers():
                yield Answer(images, kept, tuple(Failure(*failure) for failure in failures))
                if self._asks.current is not asks:
                    raise RuntimeError("a stream of pictures cannot go on: another one of the same pool has begun.")
        finally:
            if self._asks.current is asks:
                self._asks.current = ()  # what it is asked for may hold on to this pool, and its workers with it

    def _answers(self) -> Iterator[Any]:
        try:
            with _signals_held_back():
                answers = iter(self._loader)
            yield from answers
        except (EOFError, OSError) as error:  # of a worker that is dying, before torch sees that it is dead
            dead = _first_dead(_workers(self._loader))
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid {dead[0]}) was killed.") from error


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """While workers are started: one must not be ended by what the job is asked to do, before it ignores that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _workers(loader: DataLoader[Any]) -> list[Any]:
    """Its processes: none before the first stream."""
    return getattr(loader._iterator, "_workers", [])


def _first_dead(workers: list[Any]) -> list[int]:
    """The pids of the first to die within a second."""
    pids = {worker.sentinel: worker.pid for worker in workers}
    return [pids[one] for one in wait(list(pids), timeout=1)]


def _end_workers(loader: DataLoader[Any]) -> None:
    """Where Python itself ends workers, it waits for ever: they ignore its SIGTERM."""
    if workers := _workers(loader):
        iterator: Any = loader._iterator
        with suppress(RuntimeError):  # if one was killed, torch has said so before
            iterator._shutdown_workers()  # which waits some seconds for each
        for worker in workers:
            if worker.is_alive():  # it hangs in reading a file
                worker.kill()


class _Asks:
    """A sampler whose samples are set anew for each stream."""

    current: Iterable[Ask] = ()

    def __iter__(self) -> Iterator[Ask]:
        return iter(self.current)


class _Work(Dataset[Any]):
    """What a worker does. It answers in plain tuples, of which a loader can pin the tensors."""

    def __init__(self, image_set: ImageSet, partners: ImageSet, renderer: Renderer | None) -> None:
        self._image_set, self._partners, self._renderer = image_set, partners, renderer

    def __getitem__(self, ask: Ask) -> tuple[Tensor, Tensor, list[tuple[int, str, str]]]:
        with generators_kept():  # once a batch: rendering seeds them for each picture
            return self._answer(ask)

    def _answer(self, ask: Ask) -> tuple[Tensor, Tensor, list[tuple[int, str, str]]]:
        failures: list[tuple[int, str, str]] = []
        own = [self._render(self._image_set, at, ask.view, failures) for at in ask.positions.tolist()]
        partners: dict[int, Tensor | None] = {}
        if ask.rows is not None and ask.partners is not None:
            for row, at in zip(ask.rows.tolist(), ask.partners.tolist(), strict=True):
                partners[row] = self._render(self._partners, at, ask.view, failures)
        kept = [row for row, image in enumerate(own) if image is not None and partners.get(row, image) is not None]
        images = [own[row] for row in kept] + [partners[row] for row in kept if row in partners]
        stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)  # type: ignore[arg-type]
        return stacked, torch.tensor(kept, dtype=torch.int64), failures

    def _render(
        self, image_set: ImageSet, at: int, view: int | None, failures: list[tuple[int, str, str]]
    ) -> Tensor | None:
        """One picture; None, with its failure noted, where that cannot be had: errors must not cross processes as
        exceptions, which would arrive as tracebacks.
        """
        sample_id = int(image_set.sample_ids[at])
        try:
            pixels = image_set.read(at)
            if self._renderer is None or view is None:
                return torch.from_numpy(pixels)
            return self._renderer.picture(pixels, sample_id, view)
        except UnreadableImage as error:
            failures.append((sample_id, str(error), "image"))
        except DataError as error:
            failures.append((sample_id, str(error), "data"))
        except RecipeError as error:
            failures.append((sample_id, str(error), "recipe"))
        return None


def _as_it_is(answer: Any) -> Any:
    return answer


def _start(number: int) -> None:
    """A worker's first act: leave signals to the job, and die with it."""
    for one in IGNORED:
        signal.signal(one, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)
