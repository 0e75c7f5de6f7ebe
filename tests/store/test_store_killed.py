"""A writer that is killed at any moment, and run again, leaves the bytes of an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from made_store import folder_bytes, make_store

from store import missing_units, open_store

TESTS = Path(__file__).parents[1]

WRITER = """
import sys
from pathlib import Path
from made_store import make_store, MadeStore
from store import missing_units, sweep_partial
import store.writer
path = Path(sys.argv[1])
sweep_partial(path)
real = store.writer.create_store
import made_store
made_store.create_store = lambda path, *rest: None if path.exists() else real(path, *rest)
made = make_store(path, num_views=3, fill=False)
print("ready", flush=True)
made.fill(missing_units(path, made.manifest))
"""


def start_writer(path):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=environment, stdout=subprocess.PIPE)


def test_killed_and_rerun_writers_leave_the_bytes_of_an_undisturbed_one(tmp_path):
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
