"""Signals and --max-duration: commands finish their step, save and exit with 75, and a rerun gives the same files."""

import re
import signal
from pathlib import Path

import pytest
from support.compare_runs import differing_files
from support.kdpipe_process import kdpipe, signal_when, start

STOPS = (
    ("train-teacher", signal.SIGTERM, "teacher/checkpoint.safetensors"),
    ("cache-teacher", signal.SIGINT, "store.zarr/markers/c/2"),
    ("train-student", signal.SIGUSR1, "students/distilled-seed0/checkpoint.safetensors"),
    ("compress", signal.SIGUSR2, "compressed/int8-seed0/checkpoint.safetensors"),
)


@pytest.mark.slow
def test_stages_stopped_by_signals_end_with_the_same_files(done, recipe, tmp_path):
    run = tmp_path / "run"
    for command, number, sign in STOPS:
        process = start(command, recipe, "--run", run)
        signal_when(process, (run / sign).exists, number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert f"stopped early at {number.name}; all finished work is saved" in errors
        assert output == ""
        ended = kdpipe(command, recipe, "--run", run)
        assert ended.returncode == 0, ended.stderr
    assert differing_files(run, done[0]) == []


def test_max_duration_stops_a_run(recipe, tmp_path):
    ended = kdpipe("run", recipe, "--run", tmp_path / "run", "--max-duration", "1s")
    assert ended.returncode == 75, ended.stderr
    assert "stopped early after 1 s (--max-duration); all finished work is saved" in ended.stderr
    refused = kdpipe("run", recipe, "--run", tmp_path / "run", "--max-duration", "soon")
    assert refused.returncode == 2
    assert "'soon' is not a duration: write 3h30m" in re.sub(r"\s+", " ", refused.stderr)


@pytest.mark.slow
def test_a_second_sigint_aborts_without_damage(done, recipe, tmp_path):
    run = tmp_path / "run"
    process = start("run", recipe, "--run", run, "--set", "teacher.train.checkpoint_every_s=1000")
    signal_when(process, lambda: "teacher" in progress(run), signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (75, 130), errors  # 75 where the first one was quick
    assert "Traceback" not in errors
    ended = kdpipe("train-teacher", recipe, "--run", run)
    assert ended.returncode == 0, ended.stderr
    model = Path("teacher/model.safetensors")
    assert (run / model).read_bytes() == (done[0] / model).read_bytes()


def progress(run):
    """Return the content of the event log."""
    return (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["bench", "RUN/students/alone-seed0/model.onnx", "--rounds", "100000"], signal.SIGTERM),
        (["sensitivity", "RECIPE", "--run", "RUN", "--batches", "1000"], signal.SIGUSR1),
    ],
)
def test_commands_that_write_nothing_stop_too(done, recipe, arguments, number):
    places = {"RUN": str(done[0]), "RECIPE": str(recipe)}
    process = start(*[re.sub("RUN|RECIPE", lambda found: places[found[0]], argument) for argument in arguments])
    signal_when(process, lambda: handles(process.pid, number), number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped early at {number.name}" in errors
    assert "Traceback" not in errors


def handles(pid, number):
    """Return whether the process has a handler for the signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) & 1 << (number - 1))
