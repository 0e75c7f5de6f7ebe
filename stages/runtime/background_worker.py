"""A bounded background thread that runs tasks in order, so that the teacher does not wait for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class BackgroundWorker(Generic[T]):
    """A context manager with one thread that calls `work` on each item, in the order of `submit`.

    After the first error in `work` no more items are processed; `submit`, and the end of the block, raise that error.
    If the block itself raises, waiting items are discarded, and the current item is finished before the block is left.
    The block's own error is never replaced; an error of the worker is added to it as a note.

    Args:
        work: Processes an item. If it raises, it must release the item's resources itself.
        num_waiting: The number of items that may wait, at least 1.
        discard: Called once, from either thread, for each item that will not be processed, to release its resources.
            It must not raise.
    """

    def __init__(
        self, work: Callable[[T], None], num_waiting: int, discard: Callable[[T], None] = lambda item: None
    ) -> None:
        self._work, self._num_waiting, self._discard = work, num_waiting, discard
        self._executor = ThreadPoolExecutor(1, "background")
        self._pending: deque[tuple[Future[None], list[T]]] = deque()
        self._has_failed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def submit(self, item: T) -> None:
        """Queue an item, waiting while the queue is full; discards it and raises the worker's error, if any."""
        try:
            while self._pending and (len(self._pending) > self._num_waiting or self._pending[0][0].done()):
                self._pending[0][0].result()  # a failed one raises, and stays first
                self._pending.popleft()
            box = [item]  # emptied by the worker, so that processed items are freed
            self._pending.append((self._executor.submit(self._run, box), box))
        except BaseException:
            self._discard(item)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard_waiting()
        try:
            wait(future for future, _ in self._pending)
        except BaseException:  # interrupted: wait only for the current item
            self._discard_waiting()
            wait(future for future, _ in self._pending)
            raise
        finally:
            self._executor.shutdown(wait=False)
        for future, _ in self._pending:
            failure = None if future.cancelled() else future.exception()
            if failure is not None and error is None:
                raise failure
            if failure is not None and error is not None and failure is not error:
                error.add_note(f"The background worker had failed too: {failure!r}")

    def _run(self, box: list[T]) -> None:
        if self._has_failed.is_set():
            self._discard(box.pop())
            return
        try:
            self._work(box.pop())
        except BaseException:
            self._has_failed.set()
            raise

    def _discard_waiting(self) -> None:
        for future, box in self._pending:
            if not future.cancelled() and future.cancel():
                self._discard(box.pop())
