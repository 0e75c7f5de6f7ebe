"""A bounded background thread that runs tasks in order, so that the teacher does not wait for the disk.

`queue.Queue` cannot wake a blocked `put` when the worker fails; one condition over a deque can.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
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
        num_waiting: The number of items that may wait, at least 1; num_waiting + 1 exist at most.
        discard: Called once, from either thread, for each item that will not be processed, to release its resources.
            It must not raise.
    """

    def __init__(
        self, work: Callable[[T], None], num_waiting: int, discard: Callable[[T], None] = lambda item: None
    ) -> None:
        if num_waiting < 1:
            raise ValueError(f"num_waiting must be at least 1, not {num_waiting}")
        self._work = work
        self._discard = discard
        self._num_waiting = num_waiting
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()  # guards the following attributes
        self._error: BaseException | None = None
        self._closed = False
        self._ended = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="background", daemon=False).start()
        return self

    def submit(self, item: T) -> None:
        """Queue an item, waiting while the queue is full; discards it and raises the worker's error, if any."""
        accepted = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._error or len(self._waiting) < self._num_waiting)
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise RuntimeError("submit after the end of the `with` block")
                accepted = True
                self._waiting.append(item)
                self._changed.notify_all()
        finally:
            if not accepted:
                self._discard(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard_waiting()
        try:
            self._wait_for_end()
        except BaseException:  # interrupted: wait only for the current item
            self._discard_waiting()
            self._wait_for_end()
            raise
        if self._error is None or self._error is error:
            return
        if error is None:
            raise self._error
        error.add_note(f"The background worker had failed too: {self._error!r}")

    def _wait_for_end(self) -> None:
        # Not Thread.join: in Python 3.11, once interrupted, it considers the thread finished.
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)

    def _run(self) -> None:
        try:
            while taken := self._take():
                self._work(taken.pop())  # without a name, which would keep the item alive while waiting for the next
        except BaseException as error:  # raised in the main thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._discard_waiting()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _take(self) -> list[T]:
        """Return the next item in a list of one, or an empty list after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken = [self._waiting.popleft()] if self._waiting else []
            self._changed.notify_all()
            return taken

    def _discard_waiting(self) -> None:
        with self._changed:
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for item in dropped:
            self._discard(item)
