"""Atomic writes and file locks."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from kdpipe.store import LockedError, exclusive, sweep_partial, write_atomically
from kdpipe.store.fs.lock import shared


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, b"new", 3)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("of_folder", [False, True])
def test_errors_of_fsync_name_the_path(tmp_path, monkeypatch, of_folder):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folder:
            raise OSError(errno.EIO, "Input/output error")  # has no file name
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error") as raised:
        write_atomically(tmp_path / "file", b"new")
    assert raised.value.filename == str(tmp_path if of_folder else tmp_path / "file")


def test_sweep_removes_only_partial_files_of_killed_writers(tmp_path):
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
from kdpipe.store import exclusive
with exclusive(Path("the folder"), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_error_names_holder_and_dead_holder_releases(tmp_path):
    lock = tmp_path / "lock"
    environment = {**os.environ, "SLURM_JOB_ID": "", "PBS_JOBID": "77.server"}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(
            LockedError, match=rf"^the folder is in use by process {holder.pid} on .* \(job 77.server\), for \d+ s; "
        ),
        exclusive("the folder", lock),
    ):
        pass
    holder.kill()
    holder.wait()
    with exclusive("the folder", lock):
        pass


def is_refused(lock_manager):
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_manager)
        except LockedError:
            return True
    return False


def test_shared_and_exclusive_locks_exclude_each_other(tmp_path):
    lock = tmp_path / "new" / "lock"
    with shared("it", lock), shared("it", lock):
        assert is_refused(exclusive("it", lock))
    with exclusive("it", lock):
        assert is_refused(shared("it", lock))
        assert is_refused(exclusive("it", lock))
    assert not is_refused(exclusive("it", lock))
    assert not is_refused(shared("it", lock))


FORK_IN_THE_BLOCK = """
import os, sys, time
from pathlib import Path
from kdpipe.store import exclusive
with exclusive("it", Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
print(child, flush=True)
"""


def test_lock_is_released_despite_a_living_forked_child(tmp_path):
    lock = tmp_path / "lock"
    parent = subprocess.Popen([sys.executable, "-c", FORK_IN_THE_BLOCK, str(lock)], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    try:
        assert not is_refused(exclusive("it", lock))
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_error_in_block_releases_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive("it", tmp_path / "lock"):
        raise ZeroDivisionError
    assert not is_refused(exclusive("it", tmp_path / "lock"))


def test_waiting_lock_is_granted_on_release(tmp_path):
    lock, begun, steps = tmp_path / "lock", threading.Event(), []

    def wait_for_it():
        begun.set()
        with exclusive("it", lock, wait=True):
            steps.append("second")

    with exclusive("it", lock):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert begun.wait(30)
        thread.join(0.05)  # time for a lock that does not wait to show it
        steps.append("first")
    thread.join(30)
    assert steps == ["first", "second"]


def test_waiting_for_a_long_section_may_be_given_up(tmp_path):
    lock, calls = tmp_path / "lock", []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise TimeoutError

    with exclusive(tmp_path, lock), pytest.raises(TimeoutError), exclusive(tmp_path, lock, check=check):
        pass
    with exclusive(tmp_path, lock, check=check):
        assert len(calls) == 3
