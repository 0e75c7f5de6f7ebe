"""Files are whole or absent; a folder has one job at a time."""

import subprocess
import sys

import pytest

from store import LockedError, exclusive, sweep_partial, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, b"new", 3)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path):
    path = tmp_path / "a.zarr"
    (path / "logits").mkdir(parents=True)
    keep = [path / "logits" / "0", tmp_path / ".b.zarr.1234.partial"]
    litter = [path / "logits" / ".0.1234.partial", tmp_path / ".a.zarr.1234.partial"]
    for file in [*keep, *litter]:
        file.write_bytes(b"x")
    sweep_partial(path)
    assert [file.exists() for file in [*keep, *litter]] == [True, True, False, False]


HOLD = """
import sys, time
from pathlib import Path
from store import exclusive
with exclusive(Path("the folder"), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_job_is_told_who_holds_the_folder_and_a_dead_holder_holds_nothing(tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(LockedError, match=f"the folder is in use by process {holder.pid} on "),
        exclusive("the folder", lock),
    ):
        pass
    holder.kill()
    holder.wait()
    with exclusive("the folder", lock):
        pass
