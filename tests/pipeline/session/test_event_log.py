"""`events.jsonl`: what is written when, that it survives kills and full disks, and that it never ends a job."""

import errno
import json
import os
import threading

import pytest
import typer

from pipeline.session import event_log as events
from pipeline.session.event_log import event_log, to_all
from stages.errors import RecipeError, StoppedEarly
from stages.watch import WARNING, Event
from store.errors import FingerprintMismatch
from store.lock import LockedError


def step(number, total=100, **metrics):
    return Event("train-student", "alone student, seed 0", number, total, "step", metrics)


def lines_of(folder):
    """The lines, but for empty ones: a writer that comes while another writes may begin with one."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line]


def test_a_job_is_written_down_from_begin_to_end(tmp_path, monkeypatch):
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
def test_the_last_line_has_the_exit_status_and_the_error_goes_on(tmp_path, error, code):
    with pytest.raises(type(error)), event_log(tmp_path, "run"):
        raise error
    assert lines_of(tmp_path)[-1]["exit_code"] == code


def test_a_status_that_was_told_stands(tmp_path):
    with event_log(tmp_path, "run") as log:
        log.ended(3)
    assert [line["kind"] for line in lines_of(tmp_path)] == ["begin", "end"]
    assert lines_of(tmp_path)[-1]["exit_code"] == 3


def test_steps_are_spaced_and_figures_and_warnings_never_left_out(tmp_path):
    with event_log(tmp_path, "run") as report:
        for number in range(1, 101):
            report(step(number))
            if number % 25 == 0:
                report(step(number, accuracy=number / 100, epoch=number // 25))
        report(Event("data", "one is odd", 1, 1, WARNING))
        report(Event("data", "one is odd", 1, 1, WARNING))
    told = lines_of(tmp_path)[1:-1]
    assert [line["step"] for line in told if line["kind"] == "progress"] == [1, 25, 50, 75, 100]
    assert [line["job"] for line in told if line["kind"] == "warning"] == ["one is odd"] * 2


def test_what_a_killed_writer_left_of_a_line_spoils_no_other(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "begin"}\n{"kind": "prog')
    with event_log(tmp_path, "run"):
        pass
    whole, torn, *ours = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (whole, torn) == ('{"kind": "begin"}', '{"kind": "prog')
    assert [json.loads(line)["kind"] for line in ours] == ["begin", "end"]


def test_several_writers_of_one_file_keep_their_lines_apart(tmp_path):
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


def test_a_full_disk_is_told_once_and_the_job_goes_on(tmp_path, monkeypatch, capsys):
    real = os.write
    with event_log(tmp_path, "run") as report:
        monkeypatch.setattr(
            events.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        report(step(1))
        report(step(100, epoch=1))
        monkeypatch.setattr(events.os, "write", real)  # somebody made room
    assert capsys.readouterr().err.count("kdpipe: warning: ") == 1
    assert [line["kind"] for line in lines_of(tmp_path)] == ["begin", "end"]


def test_a_line_that_was_written_in_part_is_closed_by_the_next(tmp_path, monkeypatch, capsys):
    real = os.write
    with event_log(tmp_path, "run") as report:
        monkeypatch.setattr(events.os, "write", lambda descriptor, line: real(descriptor, line[:20]))
        report(step(1))
        monkeypatch.setattr(events.os, "write", real)
    *_, torn, end = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(torn) == 20
    assert json.loads(end)["kind"] == "end"
    assert "a part of a line" in capsys.readouterr().err


def test_neither_a_link_nor_a_pipe_at_its_place_is_written_to(tmp_path, capsys):
    for name, make in (("link", lambda at: at.symlink_to(tmp_path / "elsewhere")), ("pipe", os.mkfifo)):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "events.jsonl")
        with event_log(folder, "run") as report:
            report(step(1))
        assert capsys.readouterr().err.count("kdpipe: warning: ") == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_gone_does_not_end_a_job(tmp_path, capsys):
    with event_log(tmp_path / "gone", "run") as report:
        report(step(1))
    assert "the job goes on" in capsys.readouterr().err


def test_figures_that_json_does_not_know_are_written_as_json_all_the_same(tmp_path):
    with event_log(tmp_path, "run") as report:
        report(step(1, loss=float("nan"), losses={"kd": [float("inf"), 1.0]}, place=tmp_path))
    line = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert line["metrics"] == {"loss": None, "losses": {"kd": [None, 1.0]}, "place": str(tmp_path)}


def test_a_line_is_never_longer_than_what_readers_look_at(tmp_path):
    with event_log(tmp_path, "run") as report:
        report(Event("data", "x" * 10**6, 1, 1, WARNING))
    assert all(len(line) < events.MOST_LINE_BYTES for line in (tmp_path / "events.jsonl").read_text().splitlines())


def test_one_reporter_hands_events_to_several():
    seen = []
    to_all(seen.append, seen.append)(step(1))
    assert seen == [step(1), step(1)]
