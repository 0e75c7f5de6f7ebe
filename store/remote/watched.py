"""Watch a download: a stop request ends it at once, and a server that sends next to nothing ends it soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

WINDOW_S = 30.0
"""How long a server may be slower than MIN_BYTES_PER_S: connecting, redirects and retries included."""

MIN_BYTES_PER_S = 1024

POLL_S = 0.05


def watched(download: Callable[[Callable[[int], None]], T], check: Callable[[], None]) -> T:
    """Return what `download(count)` returns, which calls `count(n)` whenever n bytes have arrived.

    It runs in a daemon thread: Python cannot interrupt a wait for a server, but can leave it. `check` is called all the
    time and may raise, to stop. Raises TimeoutError where a server is too slow.
    """
    result: Future[T] = Future()
    received, is_left = 0, threading.Event()

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        if is_left.is_set():
            raise ConnectionAbortedError("the download was stopped")

    def run() -> None:
        try:
            result.set_result(download(count))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    began, before = time.monotonic(), 0
    try:
        while not wait([result], timeout=POLL_S).done:
            check()
            if time.monotonic() - began > WINDOW_S:
                if received - before < MIN_BYTES_PER_S * WINDOW_S:
                    raise TimeoutError(
                        f"the server sent {received - before:,} bytes in {WINDOW_S:g} s, fewer than "
                        f"{MIN_BYTES_PER_S:,} a second"
                    )
                began, before = time.monotonic(), received
    finally:
        is_left.set()
    return result.result()
