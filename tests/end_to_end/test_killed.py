"""A killed run ends with the same files; a folder has one job at a time."""

import signal

import pytest
from support.compare_runs import differing_files
from support.kdpipe_process import kdpipe, kdpipe_here, signal_when, start


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_files(done, recipe, tmp_path):
    run = tmp_path / "run"
    midway = [
        (run / "teacher" / "checkpoint.safetensors").exists,
        lambda: any((run / "store.zarr" / "markers" / "c").rglob("0/0/0")),
        (run / "students" / "alone-seed0" / "checkpoint.safetensors").exists,
        (run / "students" / "distilled-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / "pruned-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / "int8-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / "artifacts-seed0" / ".int8.partial" / "model.onnx").exists,
    ]
    for ready in midway:
        process = start("run", recipe, "--run", run)
        signal_when(process, ready, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    ended = kdpipe("run", recipe, "--run", run)
    assert ended.returncode == 0, ended.stderr
    assert differing_files(run, done[0]) == []
    assert not list(run.rglob("*.partial")) and not list(run.rglob("checkpoint.safetensors"))


def test_a_second_job_in_the_same_run_folder_exits_11(recipe, tmp_path):
    run = tmp_path / "run"
    first = start("train-teacher", recipe, "--run", run)
    signal_when(first, (run / "recipe.json").exists, signal.SIGSTOP)
    second = kdpipe_here("train-teacher", recipe, "--run", run, "--share")
    first.kill()
    first.communicate()
    assert second.exit_code == 11
    assert f"in use by process {first.pid}" in second.stderr
