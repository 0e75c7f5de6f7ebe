"""Target stores: filled by several jobs, extended, read from a bucket, planned."""

import json
import os
import signal
from contextlib import ExitStack

import pytest
from support.kdpipe_process import kdpipe_here, signal_when, start
from support.made_store import folder_bytes
from support.s3_server import s3_environment, s3_server, upload_folder
from support.staging_jobs import Web, running

from kdpipe.store import claim, open_store

CANARY = "hunter2"
"""A password that must not be printed or written."""

SMALL = ["--set", "cache.shard_bytes=4096", "--set", "cache.batch_size=8"]


def run_like(done, tmp_path):
    """Create a run folder with the finished run's teacher."""
    run = tmp_path / "run"
    (run / "teacher").parent.mkdir()
    (run / "teacher").symlink_to(done[0] / "teacher")
    return run


@pytest.mark.slow
def test_two_concurrent_jobs_fill_one_store(done, recipe, tmp_path):
    """The store equals that of a single job."""
    run = run_like(done, tmp_path)
    jobs = []
    for rank in range(2):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        jobs.append(start("cache-teacher", recipe, "--run", run, "--json"))
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    results = [json.loads(job.communicate(timeout=120)[0])["store"] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert [result["num_units_computed"] for result in results] == [15, 15]
    assert "part 1 of 2 (counted from 0, from RANK and WORLD_SIZE)" in results[1]["part"]
    assert folder_bytes(run / "store.zarr") == folder_bytes(done[0] / "store.zarr")


def test_a_unit_claimed_by_another_job_exits_11(done, recipe, tmp_path):
    run = run_like(done, tmp_path)
    claimed = claim(run / "store.zarr", "v3-s0")
    ended = kdpipe_here("cache-teacher", recipe, "--run", run)
    assert ended.exit_code == 11
    assert f"view 3, shard 0 is being computed by process {os.getpid()} on " in ended.stderr
    claimed.release()
    assert kdpipe_here("cache-teacher", recipe, "--run", run).exit_code == 0
    assert folder_bytes(run / "store.zarr") == folder_bytes(done[0] / "store.zarr")


def test_a_signal_keeps_units_and_a_rerun_gives_the_same_bytes(done, recipe, tmp_path):
    run = run_like(done, tmp_path)
    job = start("cache-teacher", recipe, "--run", run, "--set", "cache.batch_size=1")
    signal_when(job, (run / "store.zarr" / "markers" / "c" / "2").exists, signal.SIGTERM)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode == 75, errors
    num_done = len(list((run / "store.zarr" / "markers" / "c").glob("*/*/0")))
    assert 3 <= num_done < 30
    ended = kdpipe_here("cache-teacher", recipe, "--run", run, "--set", "cache.batch_size=1", "--json")
    assert json.loads(ended.stdout)["store"]["num_units_computed"] == 30 - num_done
    assert not list(run.glob(".store.zarr.locks/*"))
    assert not list((run / "store.zarr").rglob("*.partial"))


def test_plan_and_dry_run_show_missing_units_and_write_nothing(done, recipe, tmp_path):
    run = run_like(done, tmp_path)
    planned = json.loads(kdpipe_here("plan", recipe, "--run", run, "--json").stdout)
    assert (planned["num_units"], planned["num_units_missing"], planned["exists"]) == (30, 30, False)
    assert planned["probe"]["wall_s"] > 0
    assert planned["layers_required_by"] == {"features/stage2": ["distill.1 (hint)"]}
    dry = kdpipe_here("cache-teacher", recipe, "--run", run, "--dry-run")
    assert dry.exit_code == 0
    assert "30 missing" in dry.stdout
    assert sorted(path.name for path in run.iterdir()) == ["teacher"]
    stored = kdpipe_here("plan", recipe, "--run", done[0])
    assert "none: the store is complete" in stored.stdout


def test_views_are_added_in_place_and_removed(done, recipe, tmp_path):
    run = run_like(done, tmp_path)
    few = ["--run", run, "--set", "views.num_views=2"]
    assert kdpipe_here("cache-teacher", recipe, *few).exit_code == 0
    assert json.loads(kdpipe_here("plan", recipe, "--run", run, "--json").stdout)["num_units_missing"] == 28
    assert kdpipe_here("cache-teacher", recipe, "--run", run).exit_code == 0
    assert folder_bytes(run / "store.zarr") == folder_bytes(done[0] / "store.zarr")
    assert kdpipe_here("store", "rm-views", run / "store.zarr", "--keep", "2").exit_code == 0
    assert open_store(run / "store.zarr").num_views == 2
    assert kdpipe_here("store", "verify", run / "store.zarr").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3", "web"])
def test_a_remote_archive_trains_the_same_student(done, recipe, tmp_path, monkeypatch, place):
    store, run = done[0] / "store.zarr", tmp_path / "run"
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "packed.zarr"
    assert kdpipe_here("store", "transcode", store, packed, "--archive", "zstd").exit_code == 0
    with ExitStack() as servers:
        if place == "s3":
            endpoint = servers.enter_context(s3_server())
            for name, value in s3_environment(endpoint).items():
                monkeypatch.setenv(name, value)
            where = upload_folder(endpoint, "teachers", "tiny.zarr", packed)
        else:
            address = servers.enter_context(running(Web(tmp_path))).url.removeprefix("http://")
            where = f"http://me:{CANARY}@{address}/packed.zarr?sig={CANARY}"
        named = ["--set", f'student.stores=["{where}"]']
        train = kdpipe_here("-v", "train-student", recipe, "--run", run, *named)
    assert train.exit_code == 0, train.stderr
    others = [kdpipe_here(*arguments) for arguments in (("plan", recipe, *named), ("report", run), ("status", run))]
    shown = [ended.stdout + ended.stderr for ended in (train, *others)]
    written = [file for file in run.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    assert (CANARY in "".join(shown), written) == (False, [])
    weights = "students/distilled-seed0/model.safetensors"
    assert (run / weights).read_bytes() == (done[0] / weights).read_bytes()


def test_a_store_cannot_be_written_to_a_url(done, recipe, tmp_path):
    ended = kdpipe_here("plan", recipe, "--run", tmp_path, "--set", "cache.store=s3://bucket/x")
    assert ended.exit_code == 2
    assert "is a URL: name a folder" in ended.stderr
