"""Every stage killed on its way ends as if nothing had happened; signals save first; a folder has one job at a time."""

import json
import signal
from pathlib import Path

from kdpipe_process import kdpipe, kdpipe_here, signal_when, start
from made_store import folder_bytes

COMPARED = ("teacher/model", "students/*/model", "compressed/*/model", "compressed/*/model.int8")


def test_every_stage_killed_midway_ends_as_if_nothing_had_happened(done, recipe, tmp_path):
    run = tmp_path / "run"
    midway = [
        (run / "teacher" / "checkpoint.safetensors").exists,
        lambda: any((run / "store.zarr" / "markers" / "c").rglob("0/0/0")),
        (run / "students" / "alone-seed0" / "checkpoint.safetensors").exists,
        (run / "students" / "distilled-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / "pruned-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / "int8-seed0" / "checkpoint.safetensors").exists,
        (run / "compressed" / ".artefacts-seed0.partial" / "model.int8.onnx").exists,
    ]
    for ready in midway:
        process = start("run", recipe, "--run", run)
        signal_when(process, ready, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    ended = kdpipe("run", recipe, "--run", run)
    assert ended.returncode == 0, ended.stderr
    assert folder_bytes(run / "store.zarr") == folder_bytes(done[0] / "store.zarr")
    compared: list[Path] = []
    for pattern in COMPARED:
        for suffix in (".safetensors", ".onnx", ".pt2"):
            for file in run.glob(pattern + suffix):
                compared.append(relative := file.relative_to(run))
                assert file.read_bytes() == (done[0] / relative).read_bytes(), relative
    assert len(compared) == 2 + 4 + 2 * 2 + 5  # teacher, students, pruned and int8, what is handed over
    assert not list(run.rglob("*.partial")) and not list(run.rglob("checkpoint.safetensors"))


def test_signals_save_and_exit_75_and_a_rerun_goes_on(recipe, tmp_path):
    run, longer = tmp_path / "run", ("--set", "teacher.train.epochs=40")
    checkpoint, ages = run / "teacher" / "checkpoint.safetensors", []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = start("train-teacher", recipe, "--run", run, *longer)
        ages.append(checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0)
        signal_when(process, lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > ages[-1], number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "Run the same command again" in errors
        assert "Traceback" not in errors
        assert not (run / "teacher" / "result.json").exists()
    ended = kdpipe_here("train-teacher", recipe, "--run", run, *longer, "--json")
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["teacher"]["num_epochs"] == 40


def test_a_second_job_in_the_same_run_folder_is_told_to_wait(recipe, tmp_path):
    run = tmp_path / "run"
    first = start("train-teacher", recipe, "--run", run)
    signal_when(first, (run / "recipe.json").exists, signal.SIGSTOP)
    second = kdpipe_here("train-teacher", recipe, "--run", run)
    first.kill()
    first.communicate()
    assert second.exit_code == 11
    assert f"in use by process {first.pid}" in second.stderr
