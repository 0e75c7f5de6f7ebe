"""`kdpipe env`: has what a bug report needs, and nothing private."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdpipe.pipeline.commands import env
from kdpipe.pipeline.commands.env import file_system, gpus, has_locks, print_env, private, read_env
from kdpipe.stages.runtime.gpu import nvml
from kdpipe.stages.runtime.gpu.nvml import Gpu


def test_it_has_what_a_bug_report_needs(capsys):
    found = read_env()
    assert found["kdpipe"]["version"]
    assert {"torch", "zarr", "numpy"} <= set(found["packages"])
    assert found["torch"]["version"].split("+")[0] == found["packages"]["torch"].split("+")[0]
    assert found["cpu"]["used"] >= 1
    assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0
    assert found["disks"][0]["free_bytes"] > 0
    json.dumps(found, allow_nan=False)
    print_env(found)
    shown = capsys.readouterr().out
    for word in ("kdpipe", "python", "torch", "memory", "disk"):
        assert f"\n{word} " in f"\n{shown}"


def test_host_user_and_their_folders_are_not_shown(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home" / "gretel"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "gretel")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("SLURM_JOB_USER", "gretel")
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login1")
    monkeypatch.setenv("KDPIPE_CACHE", str(home / "stores"))
    monkeypatch.setenv("KDPIPE_SEED", "7")
    monkeypatch.setenv("TMPDIR", "/scratch/gretel/tmp")
    monkeypatch.chdir(home)
    found = read_env()
    assert found["variables"]["KDPIPE_SEED"] == "7"
    assert found["variables"]["KDPIPE_CACHE"] == "~/stores"
    assert found["variables"]["TMPDIR"] == "/scratch/USER/tmp"
    assert found["disks"][0]["path"] == "~"
    print_env(found)
    shown = json.dumps(found) + capsys.readouterr().out
    for secret in (
        "gretel",
        "hunter2",
        "AWS",
        "login1",
        *([socket.gethostname()] if len(socket.gethostname()) > 3 else []),
    ):
        assert secret not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/gretel/a:/home/gretel", "~/a:~"),
        ("/home/gretel2/a", "/home/gretel2/a"),
        ("s3://key:secret@bucket/x?X-Amz-Signature=1", "s3://...@bucket/x?..."),
        ("a\x1b[31mb", "a?[31mb"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_private_parts_of_paths_and_urls_are_removed(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/gretel")
    monkeypatch.setenv("USER", "gretel")
    assert private(text) == shown


def test_gpus_are_listed_by_nvml(monkeypatch):
    found = Gpu(0, "GPU-a", "NVIDIA H200", total_bytes=140 * 2**30, driver_version="570.86", compute_capability="9.0")
    monkeypatch.setattr(nvml, "list_gpus", lambda: (found,))
    assert [", ".join(gpu.values()) for gpu in gpus()] == ["0, NVIDIA H200, 140.0 GiB, 570.86, 9.0"]
    monkeypatch.setattr(nvml, "list_gpus", lambda: None)
    assert gpus() == []


def test_the_file_system_is_that_of_the_nearest_mount(monkeypatch):
    mounts = [("/", "ext4"), ("/made/up here", "nfs4"), ("/made/up", "xfs")]
    found = [SimpleNamespace(mountpoint=folder, fstype=kind) for folder, kind in mounts]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: found)
    assert file_system(Path("/made/up here/run")) == "nfs4"
    assert file_system(Path("/made")) == "ext4"
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [])
    assert file_system(Path("/made")) == "unknown"


def test_locks_are_tried_without_leaving_a_file(tmp_path, monkeypatch):
    assert has_locks(tmp_path) is True
    monkeypatch.setattr(env.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no locks here")))
    assert has_locks(tmp_path) is False
    assert has_locks(tmp_path / "absent") is None
    assert list(tmp_path.iterdir()) == []
