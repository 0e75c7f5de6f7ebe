"""Processes that use a pool of workers and end, each in its own way: `python worker_pool_script.py NAME ...` in an
empty folder; it prints how each of them ended.

They are forks of one process, since starting Python and torch takes longer than the tests; and separate from pytest's,
since torch raises an error anywhere in a process whose worker is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from support.photographs import path_of, photographs

kept: list[Iterator[ImageBatch]] = []
"""Streams still open when Python ends."""


def stream_of(image_set: ImageSet, num_batches: int) -> Iterator[ImageBatch]:
    loader = ImageLoader(image_set, torch.device("cpu"), num_workers=2)
    kept.append(loader.stream(ViewRequest(torch.arange(4) + 4 * (number % 3)) for number in range(num_batches)))
    return kept[-1]


def leaves(image_set: ImageSet) -> None:
    next(stream_of(image_set, 100_000))
    raise SystemExit("left")


def hangs(image_set: ImageSet) -> None:
    """A worker hangs reading image 8. The job waits for it for less time than torch's default of twice 5 s."""
    _utils.MP_STATUS_CHECK_INTERVAL = 1.0
    os.mkfifo(pipe := path_of(image_set, 8).with_suffix(".pipe"))
    pipe.rename(path_of(image_set, 8))
    stream = stream_of(image_set, 3)
    next(stream)
    next(stream)


def is_killed(image_set: ImageSet) -> None:
    hangs(image_set)
    Path("workers.part").write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    Path("workers.part").rename("workers")
    time.sleep(600)


def loses_a_worker(image_set: ImageSet) -> None:
    stream = stream_of(image_set, 100_000)
    next(stream)
    try:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        list(stream)
    except RuntimeError as error:
        print("loses_a_worker:", error)


def loses_a_worker_while_it_sends(image_set: ImageSet) -> None:
    """The worker is killed while it sends a result, before torch notices."""

    def die(iterator: Any, timeout: float = 5) -> None:
        os.kill(iterator._workers[1].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    stream = stream_of(image_set, 100_000)
    next(stream)
    _MultiProcessingDataLoaderIter._try_get_data = die  # type: ignore[method-assign]
    try:
        list(stream)
    except RuntimeError as error:
        print("loses_a_worker_while_it_sends:", error)
    signal.sigwait({signal.SIGCHLD})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def main() -> None:
    children = {}
    for name in sys.argv[1:]:
        Path(name).mkdir()
        child = os.fork()
        if child == 0:
            os.chdir(name)
            globals()[name](photographs(Path("images").absolute(), 12))
            return  # run Python's exit handlers, as any process does
        children[child] = name
        Path(name, "pid").write_text(str(child))
    for _ in range(len(children)):
        pid, status = os.wait()
        print(children[pid], "ended with", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
