"""`run.json`: sessions of a run folder; kills, several processes, and errors that must not end a job."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from support.paths import ROOT

from kdpipe.pipeline.session import run_record
from kdpipe.pipeline.session.run_record import session
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.runtime import versions
from kdpipe.store.errors import FingerprintMismatch

RECIPE = {"name": "made", "seed": 5, "views": {"seed": 6}, "student": {"seeds": [0, 1]}}


def run_json(folder):
    return json.loads((folder / "run.json").read_text(), parse_constant=pytest.fail)


def begin(folder, command="run", recipe=RECIPE):
    return session(folder, command, recipe, argv=[command, "made.toml", "--set", "seed=5"])


def test_a_session_records_process_phases_and_exit_status(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with begin(tmp_path) as own:
        with own.phase("train-teacher"):
            pass
        with own.phase("train-teacher"):
            pass
        own.note(fingerprints={"store.zarr": "abc"}, device="cpu")
    record = run_json(tmp_path)
    assert record["recipe"] == RECIPE
    assert record["fingerprints"] == {"store.zarr": "abc"}
    (found,) = record["sessions"]
    assert found["argv"] == ["run", "made.toml", "--set", "seed=5"]
    assert (found["host"], found["pid"], found["job_id"], found["device"]) == (
        socket.gethostname(),
        os.getpid(),
        "77",
        "cpu",
    )
    assert found["versions"]["torch"]
    assert found["started"] <= found["ended"]
    assert found["exit_code"] == 0
    assert found["wall_s"] >= found["phases"]["train-teacher"] >= 0
    assert found["peak_memory_bytes"] > 2**20
    assert found["processes"] == 1


def test_a_killed_session_has_no_end(tmp_path):
    look = (
        "import os, signal, sys; from pathlib import Path; from kdpipe.pipeline.session.run_record import session\n"
        "with session(Path(sys.argv[1]), 'run', {}, argv=[]): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", look, str(tmp_path)], cwd=ROOT, check=False)
    with begin(tmp_path):
        pass
    first, second = run_json(tmp_path)["sessions"]
    assert (first["ended"], first["exit_code"]) == (None, None)
    assert second["exit_code"] == 0


@pytest.mark.parametrize(
    ("error", "code", "kept_seed"), [(StoppedEarly(), 75, 9), (FingerprintMismatch("", [], ""), 12, 5)]
)
def test_a_refused_recipe_does_not_replace_the_recorded_one(tmp_path, error, code, kept_seed):
    with begin(tmp_path):
        pass
    with pytest.raises(type(error)), begin(tmp_path, recipe={**RECIPE, "seed": 9}):
        raise error
    record = run_json(tmp_path)
    assert record["sessions"][1]["exit_code"] == code
    assert record["recipe"]["seed"] == kept_seed


def test_concurrent_processes_keep_each_others_sessions(tmp_path):
    def work(number):
        with begin(tmp_path, f"job{number}") as own:
            own.note(fingerprints={f"store{number}": "x"})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = run_json(tmp_path)
    assert sorted(item["command"] for item in record["sessions"]) == [f"job{number}" for number in range(6)]
    assert all(item["exit_code"] == 0 for item in record["sessions"])
    assert len(record["fingerprints"]) == 6


def test_the_last_of_many_sessions_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "MAX_SESSIONS", 3)
    for number in range(9):
        with begin(tmp_path, f"job{number}"):
            pass
    assert [item["command"] for item in run_json(tmp_path)["sessions"]] == ["job6", "job7", "job8"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"sessions": 5, "fingerprints": []}', b'{"sessions": [1, null]}'])
def test_a_damaged_file_is_replaced(tmp_path, raw):
    (tmp_path / "run.json").write_bytes(raw)
    with begin(tmp_path):
        pass
    assert len(run_json(tmp_path)["sessions"]) == 1


def test_a_write_error_is_one_warning_and_ends_no_job(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_record, "write_with_sum", refuse)
    with begin(tmp_path):
        pass
    assert capsys.readouterr().err.count("kdpipe: warning: ") == 1
    with begin(tmp_path / "absent" / "file"):  # created, as a run folder would be
        pass
    assert "cannot be written" in capsys.readouterr().err


def test_the_commit_is_that_of_kdpipes_own_checkout(tmp_path, monkeypatch):
    versions.commit.cache_clear()
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "stages" / "machine" / "versions.py"))
    assert versions.commit() == (None, None)  # no checkout, whatever repository this process stands in
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    versions.commit.cache_clear()
    head, dirty = versions.commit()
    assert (len(head), dirty) == (40, False)
    (tmp_path / "a").write_text("2")
    versions.commit.cache_clear()
    assert versions.commit() == (head, True)
    versions.commit.cache_clear()
