"""Helpers for tests of staging: a web server that counts and delays requests, and staging processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from kdpipe.store import open_store
from kdpipe.store.remote.staging_cache import StagingCache
from support.made_store import MadeStore
from support.paths import ROOT

STAGE = """
import sys
from pathlib import Path
from kdpipe.store.remote.staging import stage
from kdpipe.store.remote.staging_cache import StagingCache
print(stage(sys.argv[1], StagingCache(Path(sys.argv[2]), int(sys.argv[3]))))
"""


class Web(ThreadingHTTPServer):
    """A web server of a folder that records its requests and can hold back all but some shards."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.noting = threading.Condition()
        self.freely = threading.Event()
        self.freely.set()
        self.shards_allowed = 0
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, key: str) -> None:
        with self.noting:
            self.asked.append(key)
            self.noting.notify_all()
            is_paused = is_shard(key) and len(self.shards) > self.shards_allowed
        if is_paused:
            self.freely.wait(60)

    def hold_back(self, shards_allowed: int) -> None:
        self.shards_allowed = shards_allowed
        self.freely.clear()

    def wait_for(self, condition: Callable[[], object], *processes: subprocess.Popen) -> None:
        """Wait until the condition holds; fail at once where one of the processes has failed."""
        deadline = time.monotonic() + 60
        with self.noting:
            while not self.noting.wait_for(condition, 0.1):
                assert all(process.poll() in (None, 0) for process in processes), "a staging process failed"
                assert time.monotonic() < deadline

    @property
    def shards(self) -> list[str]:
        return [key for key in self.asked if is_shard(key)]


@contextmanager
def running(server: Web) -> Iterator[Web]:
    """Serve in a thread inside the block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.freely.set()
        server.shutdown()
        thread.join()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.note(self.path.lstrip("/"))
        super().do_GET()

    def copyfile(self, source, outputfile):
        with suppress(OSError):  # the reader was killed
            super().copyfile(source, outputfile)

    def log_message(self, *_):
        pass


def is_shard(key: str) -> bool:
    return "/c/" in key and not key.partition("/")[2].startswith(("samples", "markers"))


def staging_process(where, cache: StagingCache) -> subprocess.Popen:
    command = [sys.executable, "-c", STAGE, str(where), str(cache.folder), str(cache.max_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def stage_elsewhere(where, cache: StagingCache) -> Path:
    """Stage in a process that then ends, and so no longer uses the copy."""
    process = staging_process(where, cache)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return Path(output.strip())


def require_equal(copy: Path, made: MadeStore, num_views: int | None = None) -> None:
    """Assert that the copy is mapped and has exactly the numbers that were written."""
    store = open_store(copy)
    assert store.manifest.codec is None
    assert store.provenance == open_store(made.path).provenance
    assert store.num_views == (num_views or made.manifest.layout.num_views)
    assert [spec.name for spec in store.arrays] == [spec.name for spec in made.manifest.arrays]
    for name, values in made.contents.items():
        assert np.array_equal(store.array(name), values[: store.num_views])
    picked = made.samples.ids[::7]
    assert np.array_equal(store.gather("logits", 1, picked), made.contents["logits"][1, ::7])


def entries(cache: StagingCache) -> set[Path]:
    return {path.parent for path in cache.folder.glob("*/targets.zarr")}
