"""`events.jsonl`: its lines, kills and full disks, and errors that must not end a job."""

import errno
import json
import os
import threading

import pytest
import typer

from kdpipe.pipeline.session import event_log as log_module
from kdpipe.pipeline.session.event_log import event_log
from kdpipe.pipeline.terminal.reporter import to_all
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.runtime.events import WARNING, ProgressEvent
from kdpipe.store.errors import FingerprintMismatch
from kdpipe.store.fs.lock import LockedError


def step(number, total=100, **metrics):
    return ProgressEvent("train-student", "alone student, seed 0", number, total, "step", metrics)


def lines_of(folder):
    """Return the lines except empty ones, with which concurrent writers may begin."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line]


def test_a_job_is_logged_from_begin_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with event_log(tmp_path, "train-student", rank=1) as report:
        report(step(1))
    begin, first, end = lines_of(tmp_path)
    assert {"time", "command", "pid", "host", "rank", "kind"} <= set(begin) & set(first) & set(end)
    assert (begin["kind"], begin["job_id"], begin["pid"]) == ("begin", "77", os.getpid())
    assert (first["kind"], first["step"], first["total"], first["unit"], first["metrics"]) == (
        "progress",
        1,
        100,
        "step",
        {},
    )
    assert (end["kind"], end["exit_code"], end["command"], end["rank"]) == ("end", 0, "train-student", 1)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoppedEarly(), 75),
        (RecipeError(""), 2),
        (FingerprintMismatch("", [], ""), 12),
        (LockedError(""), 11),
        (KeyboardInterrupt(), 130),
        (ValueError(""), 1),
        (typer.Exit(3), 3),
        (SystemExit(), 0),
    ],
)
def test_the_last_line_has_the_exit_status(tmp_path, error, code):
    with pytest.raises(type(error)), event_log(tmp_path, "run"):
        raise error
    assert lines_of(tmp_path)[-1]["exit_code"] == code


def test_an_exit_status_is_written_once(tmp_path):
    with event_log(tmp_path, "run") as log:
        log.end(3)
    assert [line["kind"] for line in lines_of(tmp_path)] == ["begin", "end"]
    assert lines_of(tmp_path)[-1]["exit_code"] == 3


def test_steps_are_throttled_metrics_and_warnings_are_not(tmp_path):
    with event_log(tmp_path, "run") as report:
        for number in range(1, 101):
            report(step(number))
            if number % 25 == 0:
                report(step(number, accuracy=number / 100, epoch=number // 25))
        report(ProgressEvent("data", "one is odd", 1, 1, WARNING))
        report(ProgressEvent("data", "one is odd", 1, 1, WARNING))
    logged = lines_of(tmp_path)[1:-1]
    assert [line["step"] for line in logged if line["kind"] == "progress"] == [1, 25, 50, 75, 100]
    assert [line["job"] for line in logged if line["kind"] == "warning"] == ["one is odd"] * 2


def test_a_line_cut_by_a_kill_does_not_damage_the_next(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "begin"}\n{"kind": "prog')
    with event_log(tmp_path, "run"):
        pass
    whole, torn, *ours = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (whole, torn) == ('{"kind": "begin"}', '{"kind": "prog')
    assert [json.loads(line)["kind"] for line in ours] == ["begin", "end"]


def test_several_writers_do_not_mix_their_lines(tmp_path):
    def write(name):
        with event_log(tmp_path, name) as report:
            for number in range(200):
                report(step(number, accuracy=0.5, text="x" * 500))

    threads = [threading.Thread(target=write, args=(f"job{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(tmp_path)) == 4 * 202


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, capsys):
    real = os.write
    with event_log(tmp_path, "run") as report:
        monkeypatch.setattr(
            log_module.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        report(step(1))
        report(step(100, epoch=1))
        monkeypatch.setattr(log_module.os, "write", real)  # there is space again
    assert capsys.readouterr().err.count("kdpipe: warning: ") == 1
    assert [line["kind"] for line in lines_of(tmp_path)] == ["begin", "end"]


def test_a_partly_written_line_is_closed_by_the_next(tmp_path, monkeypatch, capsys):
    real = os.write
    with event_log(tmp_path, "run") as report:
        monkeypatch.setattr(log_module.os, "write", lambda descriptor, line: real(descriptor, line[:20]))
        report(step(1))
        monkeypatch.setattr(log_module.os, "write", real)
    *_, torn, end = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(torn) == 20
    assert json.loads(end)["kind"] == "end"
    assert "a part of a line" in capsys.readouterr().err


def test_links_and_pipes_are_not_written_to(tmp_path, capsys):
    for name, make in (("link", lambda at: at.symlink_to(tmp_path / "elsewhere")), ("pipe", os.mkfifo)):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "events.jsonl")
        with event_log(folder, "run") as report:
            report(step(1))
        assert capsys.readouterr().err.count("kdpipe: warning: ") == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_folder_does_not_end_a_job(tmp_path, capsys):
    with event_log(tmp_path / "gone", "run") as report:
        report(step(1))
    assert "the job goes on" in capsys.readouterr().err


def test_unsupported_values_become_valid_json(tmp_path):
    with event_log(tmp_path, "run") as report:
        report(step(1, loss=float("nan"), losses={"kd": [float("inf"), 1.0]}, place=tmp_path))
    line = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert line["metrics"] == {"loss": None, "losses": {"kd": [None, 1.0]}, "place": str(tmp_path)}


def test_lines_are_shorter_than_the_tail_that_is_read(tmp_path):
    with event_log(tmp_path, "run") as report:
        report(ProgressEvent("data", "x" * 10**6, 1, 1, WARNING))
    assert all(len(line) < log_module.MAX_LINE_BYTES for line in (tmp_path / "events.jsonl").read_text().splitlines())


def test_to_all_passes_events_to_every_reporter():
    seen = []
    to_all(seen.append, seen.append)(step(1))
    assert seen == [step(1), step(1)]
