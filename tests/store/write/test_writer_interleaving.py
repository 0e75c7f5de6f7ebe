"""Writers that are interleaved, killed at any file and restarted end in a single undisturbed writer's bytes.

Each writer is a thread that waits before every file that it publishes, until the test lets it continue or kills it
there; only one ever runs, so a sequence of steps is deterministic. (`test_writer_killed.py` kills real processes.)
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.made_store import folder_bytes
from support.many_stores import LOGITS, Wish, commit, first_difference, grow

import kdpipe.store.fs.atomic_write
from kdpipe.store import (
    Claim,
    LockedError,
    StoreError,
    claim,
    ensure_store,
    exclusive,
    finish_store,
    missing_arrays,
    open_store,
)
from kdpipe.store import read_store_manifest as read_manifest

SMALL = Wish(LOGITS["float16"], num_views=1, num_samples=600, num_layers=0)
WISHES = [
    SMALL,
    replace(SMALL, num_views=2),
    replace(SMALL, num_views=2, num_layers=1),
    replace(SMALL, num_views=2, num_layers=1, num_samples=1100),
]
"""Each holds the ones before it."""


class Killed(BaseException):
    """The end of a writer. Its unfinished files stay."""


class Writer:
    """A job that brings the store to a wish; it waits for its turn before each file that it publishes."""

    def __init__(self, path: Path, wish: Wish) -> None:
        self.path, self.wish = path, wish
        self.error: BaseException | None = None
        self.done, self._torn = False, None
        self._claim: Claim | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Let it publish its next file, or end."""
        self._go.release()
        self._stopped.acquire()
        if self.done:
            self._thread.join()
            if self.error is not None and not isinstance(self.error, Killed):
                raise self.error

    def kill(self, torn: bool) -> None:
        """Kill it where it is; torn: in the middle of writing the temporary file."""
        self._torn = torn
        self.step()

    def publish(self, file: Path, *parts: bytes | memoryview) -> None:
        self.pause(file, b"".join(parts))
        REAL_WRITE(file, *parts)

    def pause(self, file: Path | None = None, raw: bytes = b"") -> None:
        self._stopped.release()
        self._go.acquire()
        if self._torn is not None:
            if self._torn and file is not None:
                file.with_name(f".{file.name}.{os.urandom(4).hex()}.partial").write_bytes(raw[: len(raw) // 2])
            raise Killed

    def _run(self) -> None:
        CURRENT.writer = self
        self._go.acquire()
        try:
            if self._torn is None:
                self._fill()
        except BaseException as error:
            self.error = error
            if self._claim is not None:
                os.close(self._claim._descriptor)  # as the kernel does for a dead process: the file stays
        self.done = True
        self._stopped.release()

    def _fill(self) -> None:
        manifest = ensure_store(self.path, self.wish.manifest, self.wish.samples)
        for unit in manifest.layout.units():
            if not missing_arrays(self.path, manifest, unit):
                continue
            acquired = claim(self.path, unit.key)
            if isinstance(acquired, Claim):
                self._claim = acquired
                commit(self.path, manifest, unit)
                self._claim = None
                acquired.release()
        finish_store(self.path)


CURRENT = threading.local()
REAL_WRITE = kdpipe.store.fs.atomic_write.write_atomically


def write(file: Path, *parts: bytes | memoryview) -> None:
    writer = getattr(CURRENT, "writer", None)
    (writer.publish if writer else REAL_WRITE)(file, *parts)


@contextmanager
def exclusive_store(path: Path, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Act as the store's own lock, but give another writer a turn instead of waiting."""
    while True:
        try:
            acquired = exclusive(path, path.with_name(f".{path.name}.lock"))
            acquired.__enter__()
            break
        except LockedError:
            CURRENT.writer.pause()
    try:
        yield
    finally:
        acquired.__exit__(None, None, None)


@pytest.fixture(autouse=True, scope="module")
def stepping():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("fs.atomic_write", "write.writer", "format.markers", "write.extend", "format.zarr_metadata"):
            patch.setattr(f"kdpipe.store.{module}.write_atomically", write)
        for module in ("write.writer", "write.extend"):
            patch.setattr(f"kdpipe.store.{module}.exclusive_store", exclusive_store)
        patch.setattr("os.fsync", lambda _: None)  # a kill takes nothing from the page cache
        yield


@cache
def undisturbed(*wishes: Wish) -> dict[str, bytes]:
    """Return the files of a store that one writer brought from wish to wish."""
    with tempfile.TemporaryDirectory() as folder:
        return folder_bytes(grow(Path(folder) / "a.zarr", *wishes))


class Writers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.zarr"
        self.writers: list[Writer] = []
        self.largest = 0

    @initialize()
    def a_first_writer(self) -> None:
        self.start(0)

    def start(self, number: int) -> None:
        self.largest = max(self.largest, number)
        self.writers.append(Writer(self.path, WISHES[number]))

    @precondition(lambda self: len(self.writers) < 3)
    @rule(more=st.sampled_from([0, 0, 0, 1, 2]))
    def start_writer(self, more: int) -> None:
        self.start(min(self.largest + more, len(WISHES) - 1))

    @precondition(lambda self: self.writers)
    @rule(at=st.integers(0, 2), num_files=st.integers(1, 6))
    def go_on(self, at: int, num_files: int) -> None:
        writer = self.writers[at % len(self.writers)]
        for _ in range(num_files):
            writer.step()
            if writer.done:
                self.writers.remove(writer)
                return

    @precondition(lambda self: self.writers)
    @rule(at=st.integers(0, 2), torn=st.booleans())
    def kill(self, at: int, torn: bool) -> None:
        writer = self.writers.pop(at % len(self.writers))
        writer.kill(torn)
        assert writer.done

    @invariant()
    def a_reader_gets_the_truth_or_one_sentence(self) -> None:
        try:
            opened = open_store(self.path)
        except StoreError as error:
            assert "\n" not in str(error)
            assert "not complete" in str(error) or "no store at" in str(error)
        else:
            assert first_difference(opened) is None

    def teardown(self) -> None:
        try:
            for writer in self.writers:
                writer.kill(torn=False)
            self.finish()
        finally:
            shutil.rmtree(self.folder)

    def finish(self) -> None:
        """A last writer that nobody disturbs; then nothing tells that there were others."""
        last = Writer(self.path, WISHES[self.largest])
        while not last.done:
            last.step()
        segments = read_manifest(self.path).layout.segments
        wishes = WISHES[: self.largest + 1] if len(segments) > 1 else [WISHES[self.largest]]
        assert folder_bytes(self.path) == undisturbed(*wishes)
        left = {one.name for one in self.folder.iterdir()} - {"a.zarr", ".a.zarr.lock", ".a.zarr.locks"}
        assert not left


Writers.TestCase.settings = settings(
    max_examples=10,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestWriters = Writers.TestCase
