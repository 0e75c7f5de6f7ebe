"""A writer that is killed at any moment, and run again, leaves an undisturbed writer's bytes."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

from support.made_store import folder_bytes, make_store
from support.many_stores import LOGITS, Wish, first_difference, grow, work
from support.paths import PYTHONPATH

from kdpipe.store import StoreError, missing_units, open_store

SYNC_S = 0.001
"""At least, of a file: whatever the disk, a job is killed at its writing, and not after it."""

WRITER = f"""
import os
import sys
import time
from pathlib import Path
from support.made_store import make_store, MadeStore
from kdpipe.store import missing_units, sweep_partial
import kdpipe.store.write.writer
path = Path(sys.argv[1])
sweep_partial(path)
real = kdpipe.store.write.writer.create_store
from support import made_store
made_store.create_store = lambda path, *rest: None if path.exists() else real(path, *rest)
made = make_store(path, num_views=3, fill=False)
sync = os.fsync
os.fsync = lambda fd: (time.sleep({SYNC_S}), sync(fd))
print("ready", flush=True)
made.fill(missing_units(path, made.manifest))
"""


def start_writer(path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=environment, stdout=subprocess.PIPE)


def test_killed_and_rerun_writers_give_identical_bytes(tmp_path):
    undisturbed = make_store(tmp_path / "undisturbed.zarr", num_views=3)
    path = tmp_path / "killed.zarr"
    chance = random.Random(5)
    num_cut_short = 0
    for _ in range(6):
        writer = start_writer(path)
        writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        writer.kill()
        writer.wait()
        num_cut_short += bool(missing_units(path, undisturbed.manifest))
    last = start_writer(path)
    last.communicate()
    assert last.returncode == 0
    assert num_cut_short > 0, "no writer was killed before it was done: the test tested nothing"
    assert folder_bytes(path) == folder_bytes(undisturbed.path)
    open_store(path)


def test_two_killed_writers_fill_a_store_identically(tmp_path, monkeypatch):
    """Real processes, killed by SIGKILL: while they fill the store with claims on its units, and while it grows."""
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(SYNC_S), sync(fd)))
    small = Wish(LOGITS["float16"], num_views=2, num_samples=700, num_layers=1)
    large = replace(small, num_views=3, num_samples=1300, num_layers=2)
    undisturbed = grow(tmp_path / "undisturbed.zarr", small, large)
    path, chance, num_killed = tmp_path / "killed.zarr", random.Random(3), 0
    context = multiprocessing.get_context("fork")
    for wish in (small, large):
        for _ in range(4):
            writers = [context.Process(target=work, args=(path, wish)) for _ in range(2)]
            for writer in writers:
                writer.start()
            for writer in writers:
                time.sleep(chance.uniform(0, 0.03))
                writer.kill()
            for writer in writers:
                writer.join()
                assert writer.exitcode in (0, -signal.SIGKILL)
                num_killed += writer.exitcode != 0
            with suppress(StoreError):  # not there yet, or not complete
                assert first_difference(open_store(path)) is None
        work(path, wish)
    assert num_killed > 0, "no writer was killed before it was done: the test tested nothing"
    assert folder_bytes(path) == folder_bytes(undisturbed)
    assert not list(tmp_path.glob(".killed.zarr.*.partial"))
