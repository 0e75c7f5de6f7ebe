"""Worker processes ignore the job's signals, end with it, and leave its random state unchanged."""

import contextlib
import errno
import multiprocessing
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.paths import PYTHONPATH, TESTS
from support.photographs import in_memory, photographs

from kdpipe.stages.data.loader import workers
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.errors import DataError
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig
from kdpipe.stages.views.renderer import Renderer

CROPS = Views(operations=({"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"}))
JITTER = Views(
    engine="transforms",
    operations=({"name": "RandomResizedCrop", "size": 8}, {"name": "ColorJitter", "brightness": 0.4}),
    mix=MixConfig(mixup_alpha=0.5),
)
NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("equal"), NUM_SAMPLES)


def loader_of(image_set, num_workers, views=CROPS):
    renderer = Renderer(views, 3, image_set.image_size, torch.sort(image_set.sample_ids).values)
    return ImageLoader(image_set, DEVICE, renderer, num_workers=num_workers)


def requests(view, num_batches=20):
    """Return requests whose samples differ by view."""
    return [ViewRequest((torch.arange(4) + 5 * number + view) % NUM_SAMPLES, view) for number in range(num_batches)]


def same(stream, images):
    return all(torch.equal(batch.images, image) for batch, image in zip(stream, images, strict=True))


@pytest.fixture(scope="module")
def truth(equal):
    """The images of each view's requests, from images in memory."""
    loader = loader_of(in_memory(equal), 0)
    return [[batch.images for batch in loader.stream(requests(view))] for view in range(3)]


def started_since(before):
    return set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_abandoned_stream_does_not_affect_the_next(equal, truth, num_workers):
    loader = loader_of(equal, num_workers)
    left = loader.stream(requests(0))
    assert torch.equal(next(left).images, truth[0][0])
    stream = loader.stream(requests(1))
    assert torch.equal(next(stream).images, truth[1][0])
    left.close()  # late
    assert same(stream, truth[1][1:])
    left = loader.stream(requests(2))
    assert torch.equal(next(left).images, truth[2][0])
    del left
    assert same(loader.stream(requests(0)), truth[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_older_stream_of_a_pool_cannot_continue(equal, truth, num_workers):
    loader = loader_of(equal, num_workers)
    older = loader.stream(requests(0))
    next(older)
    newer = loader.stream(requests(1))
    assert torch.equal(next(newer).images, truth[1][0])
    with pytest.raises(RuntimeError, match="another stream of the same pool was started"):
        next(older)
    assert same(newer, truth[1][1:])


def test_errors_in_the_request_iterator_propagate(equal, truth):
    def failing():
        yield from requests(0)[:9]
        raise ConnectionResetError("the caller's own")

    loader = loader_of(equal, 2)
    with pytest.raises(ConnectionResetError, match="the caller's own"):
        list(loader.stream(failing()))
    assert same(loader.stream(requests(1)), truth[1])


def states():
    name, words, *rest = np.random.get_state()
    return (random.getstate(), torch.default_generator.get_state().tolist(), name, words.tolist(), *rest)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_state_of_the_job_is_unchanged(equal, num_workers):
    random.seed(1)
    np.random.seed(2)
    np.random.normal()  # which keeps a second number
    torch.manual_seed(3)
    before = states()
    loader = loader_of(equal, num_workers, JITTER)
    first = [batch.images for batch in loader.stream(requests(0)) if states() == before]
    assert len(first) == 20, "unchanged after each batch"
    next(loader.stream(requests(1)))
    assert states() == before
    torch.manual_seed(4)
    assert same(loader.stream(requests(0)), first), "independent of the job's seed"


def test_workers_ignore_the_signals_of_the_job(equal, truth):
    before = set(multiprocessing.active_children())
    loader = loader_of(equal, 2)
    stream = loader.stream(requests(0))
    assert torch.equal(next(stream).images, truth[0][0])
    workers = started_since(before)
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(worker.pid, number)
    assert same(stream, truth[0][1:])
    assert same(loader.stream(requests(1)), truth[1])
    assert started_since(before) == workers, "the same processes"


def no_room(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_images_go_through_a_pipe_where_shared_memory_is_full(equal, truth, monkeypatch):
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", no_room)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_room)
    assert same(loader_of(equal, 2).stream(requests(0)), truth[0])


def test_worker_that_cannot_send_ends_the_job(equal, monkeypatch):
    monkeypatch.setattr(workers, "_to_share", lambda images: lambda: images)  # which cannot be pickled
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        list(loader_of(equal, 2).stream(requests(0)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible. Please"),  # torch's
    ],
)
def test_workers_without_room_are_told_the_cure(equal, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    cure = r"\((No space left on device|Too many open files)\): .*--shm-size=1g.*data.num_workers = 0"
    with pytest.raises(DataError, match=cure):
        list(loader_of(equal, 2).stream(requests(0)))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, most_s=60):
    end = time.monotonic() + most_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


ENDED = {"leaves": 1, "hangs": 0, "is_killed": -9, "loses_a_worker": 0, "loses_a_worker_while_it_sends": 0}


@pytest.fixture
def processes(tmp_path):
    """Those of worker_pool_script.py, under way in folders of their names, until the test ends."""
    script = TESTS / "support" / "worker_pool_script.py"
    process = subprocess.Popen(
        [sys.executable, script, *ENDED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):  # none of them is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_workers_and_parent_end_together(tmp_path, processes):
    folder = tmp_path / "is_killed"
    assert wait_for((folder / "workers").exists)
    workers = [int(pid) for pid in (folder / "workers").read_text().split()]
    assert len(workers) == 2
    assert all(is_running(pid) for pid in workers)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    assert wait_for(lambda: not any(is_running(pid) for pid in workers), most_s=15), "though one of them hangs"

    message, _ = processes.communicate(timeout=60)
    lines = message.splitlines()
    for name, status in ENDED.items():
        assert f"{name} ended with {status}" in lines
    for name in ("loses_a_worker", "loses_a_worker_while_it_sends"):
        (sentence,) = (line for line in lines if line.startswith(f"{name}: "))
        assert "DataLoader worker (pid" in sentence, "which the command line recognizes"
    # A thread of multiprocessing may print a traceback in a worker whose peer is killed.
    foreign = (" ", "Traceback (most recent call last)", "ConnectionResetError", "BrokenPipeError", "EOFError")
    ours = [line for line in lines if line and not line.startswith(foreign)]
    assert len(ours) == len(ENDED) + 3, f"unexpected output: {message}"
