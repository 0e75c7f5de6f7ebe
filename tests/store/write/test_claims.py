"""A unit is claimed by one process at a time, a dead process holds nothing, and no files are left."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kdpipe.store import KdpipeError
from kdpipe.store.fs.lock import Holder
from kdpipe.store.write.claims import Claim, claim, holder

CLAIM_AND_WAIT = """
import sys
from pathlib import Path
from kdpipe.store.write.claims import claim
kept = claim(Path(sys.argv[1]), "v0-s0")
print(type(kept).__name__, flush=True)
sys.stdin.read()
"""

COUNT_UP = """
import sys, time
from pathlib import Path
from kdpipe.store.write.claims import Claim, claim, holder
store, counter = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
done = 0
while done < 50:
    kept = claim(store, "v0-s0")
    if isinstance(kept, Claim):
        count = int(counter.read_text())
        time.sleep(0.0002)
        counter.write_text(str(count + 1))
        kept.release()
        done += 1
    holder(store, "v0-s0")
"""


def start(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def store(tmp_path):
    return tmp_path / "a.zarr"


@pytest.fixture
def locks(tmp_path):
    return tmp_path / ".a.zarr.locks"


def test_live_process_keeps_claim_and_killed_one_loses_it(store, locks):
    other = start(CLAIM_AND_WAIT, store, SLURM_JOB_ID="77")
    assert other.stdout.readline() == "Claim\n"
    refused = claim(store, "v0-s0")
    assert isinstance(refused, Holder)
    assert (refused.host, refused.pid, refused.job_id) == (socket.gethostname(), other.pid, "77")
    assert holder(store, "v0-s0").pid == other.pid
    assert isinstance(claim(store, "v0-s1"), Claim)

    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert (locks / "v0-s0").exists()
    assert holder(store, "v0-s0") is None
    acquired = claim(store, "v0-s0")
    assert isinstance(acquired, Claim)
    assert holder(store, "v0-s0").pid == os.getpid()


@pytest.mark.parametrize(("here", "path"), [("a.zarr", "."), ("a.zarr/logits", "..")])
def test_claims_of_a_relative_path_are_the_same(store, monkeypatch, here, path):
    claimed = claim(store, "v0-s0")
    (store.parent / here).mkdir(parents=True)
    monkeypatch.chdir(store.parent / here)
    assert holder(Path(path), "v0-s0").pid == os.getpid()
    claimed.release()
    assert holder(Path(path), "v0-s0") is None


def test_a_released_unit_is_free_and_leaves_no_litter(tmp_path, store, locks):
    first, second = claim(store, "v0-s0"), claim(store, "v0-s1")
    assert sorted(path.name for path in locks.iterdir()) == ["v0-s0", "v0-s1"]
    first.release()
    assert [path.name for path in locks.iterdir()] == ["v0-s1"]
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_second_release_does_not_affect_next_claim(store):
    first = claim(store, "v0-s0")
    first.release()
    second = claim(store, "v0-s0")
    first.release()
    assert isinstance(second, Claim)
    assert isinstance(claim(store, "v0-s0"), Holder)


def test_another_thread_may_release(store):
    kept = claim(store, "v0-s0")
    thread = threading.Thread(target=kept.release)
    thread.start()
    thread.join()
    assert isinstance(claim(store, "v0-s0"), Claim)


def test_claim_of_removed_folder_keeps_its_successor(store, locks):
    first = claim(store, "v0-s0")
    (locks / "v0-s0").unlink()
    second = claim(store, "v0-s0")
    assert isinstance(second, Claim)
    first.release()
    assert (locks / "v0-s0").exists()


def test_a_folder_that_vanishes_as_it_is_made_is_made_again(store, locks, monkeypatch):
    """After EEXIST pathlib checks for a folder: another process may remove it in between."""
    made, times = Path.mkdir, []

    def gone_meanwhile(path, *args, **kwargs):
        if path == locks and len(times) < 3:
            times.append(1)
            raise FileExistsError(17, "File exists", str(path))
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", gone_meanwhile)
    assert isinstance(claim(store, "v0-s0"), Claim)
    assert len(times) == 3


def test_dangling_link_as_folder_is_reported(store, locks):
    locks.symlink_to("nowhere")
    with pytest.raises(KdpipeError, match="cannot be used"):
        claim(store, "v0-s0")


def test_of_four_racing_processes_one_at_a_time_has_the_unit(tmp_path, store):
    counter = tmp_path / "counter"
    counter.write_text("0")
    racers = [start(COUNT_UP, store, counter) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
        assert racer.returncode == 0
    assert counter.read_text() == "200"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_probe_does_not_refuse_a_claim(store, locks, monkeypatch):
    claim(store, "v0-s0").release()
    locks.mkdir()
    looking = os.open(locks / "v0-s0", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert holder(store, "v0-s0") is None
    real, refused = fcntl.flock, []

    def flock(descriptor, operation):
        try:
            real(descriptor, operation)
        except BlockingIOError:
            refused.append(operation)
            real(looking, fcntl.LOCK_UN)  # the probe is over
            raise

    monkeypatch.setattr("fcntl.flock", flock)
    assert isinstance(claim(store, "v0-s0"), Claim)
    assert refused == [fcntl.LOCK_EX | fcntl.LOCK_NB]
    os.close(looking)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b'{"host": "a", "pi',
        b"[]",
        b"\xff\xfe",
        b'{"host": "a", "pid": 1e999, "job_id": null, "since": 0}',
        b"[" * 2000,
    ],
)
def test_unreadable_record_is_another_job(store, locks, record):
    kept = claim(store, "v0-s0")
    (locks / "v0-s0").write_bytes(record)
    assert str(claim(store, "v0-s0")) == "another job"
    kept.release()


def test_a_holder_is_named_with_its_job_and_age():
    assert str(Holder("node7", 123, "77", 35.2)) == "process 123 on node7 (job 77), for 35 s"
    assert str(Holder("node7", 123, None, 35.2)) == "process 123 on node7, for 35 s"


def test_the_age_is_counted_from_the_record(store, locks, monkeypatch):
    kept = claim(store, "v0-s0")
    since = json.loads((locks / "v0-s0").read_text())["since"]
    monkeypatch.setattr("time.time", lambda: since + 90)
    assert holder(store, "v0-s0").age_s == 90
    monkeypatch.setattr("time.time", lambda: since - 90)
    assert holder(store, "v0-s0").age_s == 0
    kept.release()


def test_absent_store_has_no_holder(store, tmp_path):
    assert holder(store, "v0-s0") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(store, locks, monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(KdpipeError, match=f"the file system of {locks} does not support file locks"):
        claim(store, "v0-s0")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(KdpipeError, match=r"v0-s0 cannot be used \(Not a directory\): make "):
        claim(tmp_path / "file" / "a.zarr", "v0-s0")
    with pytest.raises(KdpipeError, match=r"v0-s0 cannot be used \(Not a directory\): make "):
        holder(tmp_path / "file" / "a.zarr", "v0-s0")

    def read_only(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.open", read_only)
    with pytest.raises(KdpipeError, match=r"v0-s0 cannot be used: the file system is read-only; have it mounted"):
        claim(tmp_path / "a.zarr", "v0-s0")


def test_a_link_in_a_lock_files_place_is_not_followed(tmp_path, store, locks):
    locks.mkdir()
    (locks / "v0-s0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KdpipeError, match="v0-s0 cannot be used"):
        claim(store, "v0-s0")
    assert not (tmp_path / "elsewhere").exists()
