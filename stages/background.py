"""Work behind the main thread's back, in order and bounded: the teacher need not wait for the disk while there is room.

`queue.Queue` cannot wake a full `put` when the worker fails; one condition over a deque can.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A context manager with one thread that calls `work` on each item, in the order of `put`.

    num_waiting: how many items may wait, at least 1. With the one in work, num_waiting + 1 are held at most.
    discard: called once, from either thread, for each item that will not be worked on, so that what it holds is let
    go. An item in whose work an error arises is not discarded: `work` lets go of it itself. It must not raise.

    After the first error in `work` nothing more is worked on; `put` raises that error, and so does the block's end.
    When the block itself raises, what still waits is discarded, and the item under way is finished before the block
    is left. The block's own error is never replaced; an error of the worker is then added to it as a note.
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
        self._changed = threading.Condition()  # guards, and tells of changes in, all that follows
        self._error: BaseException | None = None
        self._closed = False
        self._ended = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="background", daemon=False).start()
        return self

    def put(self, item: T) -> None:
        """Hand over an item; waits only while the queue is full. Discards it and raises the worker's error, if any."""
        accepted = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._error or len(self._waiting) < self._num_waiting)
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise RuntimeError("put after the end of the `with` block: nobody would work on it")
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
        except BaseException:  # interrupted in waiting for the queue: wait for the item under way alone
            self._discard_waiting()
            self._wait_for_end()
            raise
        if self._error is None or self._error is error:
            return
        if error is None:
            raise self._error
        error.add_note(f"The background worker had failed too: {self._error!r}")

    def _wait_for_end(self) -> None:
        # Not Thread.join: in Python 3.11, once interrupted, it takes the thread for finished.
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)

    def _run(self) -> None:
        try:
            while taken := self._take():
                self._work(taken.pop())  # no name for the item: it would live on while the next one is taken
        except BaseException as error:  # whatever it is, it belongs to the main thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._discard_waiting()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _take(self) -> list[T]:
        """The next item, alone in a list; an empty one after the last."""
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
