"""`kdpipe status`: state of runs and stores, untrusted folders, tables, and the time it takes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.cells import cell_len
from support.kdpipe_process import kdpipe_here
from support.paths import ROOT

from kdpipe.pipeline.session.event_log import event_log
from kdpipe.pipeline.status import files as status_files
from kdpipe.pipeline.status import runs as status_runs
from kdpipe.pipeline.status import scan
from kdpipe.pipeline.status.scan import read_status
from kdpipe.pipeline.status.table import print_status
from kdpipe.stages.errors import RunError
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.store.fs.lock import exclusive, shared
from kdpipe.store.write.claims import claim

RECIPE = {
    "name": "made",
    "data": {},
    "student": {"seeds": [0, 1]},
    "compress": {"steps": ["prune"], "quantize": {"scheme": "int8"}},
}


def run_folder(folder, jobs=None, recipe=RECIPE):
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    for job, accuracy in (jobs or {}).items():
        (folder / job).mkdir(parents=True)
        (folder / job / "result.json").write_text(json.dumps({"accuracy": accuracy}))
    return folder


def write_events(folder, *lines, host=None, at=None):
    now = time.time() if at is None else at
    made = [
        {
            "time": datetime.fromtimestamp(now + seconds, UTC).isoformat(),
            "command": "run",
            "pid": 4711,
            "host": host or socket.gethostname(),
            **line,
        }
        for seconds, line in lines
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))


def progress(step, job="distilled student, seed 1"):
    where = {"kind": "progress", "stage": "train-student", "job": job, "step": step, "total": 1000, "unit": "step"}
    return {**where, "metrics": {}}


def only_run(root):
    (run,) = read_status(root).runs
    return run


def text_of(capsys, root):
    print_status(read_status(root))
    return capsys.readouterr().out


def test_a_running_job_has_process_progress_rate_and_eta(tmp_path):
    run = run_folder(tmp_path / "run")
    write_events(run, (-20, {"kind": "begin"}), (-11, progress(100)), (-1, progress(300)))
    with exclusive(run, run / ".kdpipe.lock"):
        found = only_run(tmp_path)
    assert (found.state, found.stage, found.job) == ("running", "train-student", "distilled student, seed 1")
    assert f"pid {os.getpid()} on {socket.gethostname()}" in found.who
    assert (found.step, found.total) == (300, 1000)
    assert found.rate_per_s == pytest.approx(20)
    assert found.eta_s == pytest.approx(34, abs=1)


def test_a_shared_lock_counts_as_running(tmp_path):
    run = run_folder(tmp_path / "run")
    with shared(run, run / ".kdpipe.lock"):
        assert only_run(tmp_path).state == "running"


def test_a_run_whose_process_is_gone_is_killed(tmp_path):
    run = run_folder(tmp_path / "run")
    write_events(run, (-20, {"kind": "begin"}), (-1, progress(300)))
    with exclusive(run, run / ".kdpipe.lock"):
        pass
    found = only_run(tmp_path)
    assert (found.state, found.rate_per_s, found.eta_s) == ("killed", None, None)
    assert "4711" in found.who


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (3, "done in part"), (75, "stopped early"), (12, "failed (exit 12)"), (130, "interrupted")],
)
def test_a_run_that_ended_has_its_exit_status(tmp_path, code, state):
    run = run_folder(tmp_path / "run")
    write_events(run, (-20, {"kind": "begin"}), (-2, progress(300)), (-1, {"kind": "end", "exit_code": code}))
    assert only_run(tmp_path).state == state


@pytest.mark.parametrize(
    ("before", "worked", "state"),
    [
        (0, False, "done"),
        (75, False, "stopped early"),
        (None, False, "failed (exit 12)"),
        (0, True, "failed (exit 12)"),
    ],
)
def test_a_refused_attempt_does_not_change_the_state(tmp_path, before, worked, state):
    run = run_folder(tmp_path / "run")
    first = [(-30, progress(300)), (-20, {"kind": "end", "exit_code": before})] if before is not None else []
    scanned = {**progress(9), "unit": "image", "job": "scan the images"}
    tried = [{"kind": "begin"}, progress(300) if worked else scanned, {"kind": "end", "exit_code": 12}]
    write_events(run, *first, *((-5, {**line, "pid": 4712}) for line in tried))
    assert only_run(tmp_path).state == state


def test_a_folder_of_the_python_api_says_so(tmp_path, capsys):
    """Networks that no call has begun are not missing there."""
    run = run_folder(tmp_path / "run", {"teacher": 0.9, "students/distilled-seed0": 0.8})
    (run / ".made-in-python").touch()
    found = only_run(tmp_path)
    assert (found.command, found.state, found.num_networks_done, found.num_networks) == ("python", "done", 2, 2)
    assert "python" in text_of(capsys, tmp_path)


def test_a_job_on_another_machine_goes_by_its_last_event(tmp_path):
    run = run_folder(tmp_path / "run")
    write_events(run, (-5, progress(300)), host="node7")
    assert (only_run(tmp_path).state, "node7" in only_run(tmp_path).who) == ("running", True)
    write_events(run, (-5, progress(300)), host="node7", at=time.time() - status_runs.SILENT_S)
    assert only_run(tmp_path).state == "killed"


def test_events_written_by_event_log_are_read(tmp_path):
    run = run_folder(tmp_path / "run")
    with event_log(run, "train-student") as report:
        report(ProgressEvent("train-student", "alone student, seed 0", 1, 10, "step"))
        assert only_run(tmp_path).job == "alone student, seed 0"
    assert only_run(tmp_path).state == "done"


def test_a_run_without_events_goes_by_its_results(tmp_path):
    jobs = {f"students/{kind}-seed{seed}": 0.9 for kind in ("alone", "distilled") for seed in (0, 1)}
    run = run_folder(tmp_path / "run", jobs)
    assert (only_run(tmp_path).state, only_run(tmp_path).num_networks_done) == ("idle", 4)
    for job in ("teacher", "compressed/pruned-seed0", "compressed/pruned-seed1"):
        (run / job).mkdir(parents=True)
        (run / job / "result.json").write_text('{"accuracy": 0.8}')
    found = only_run(tmp_path)
    assert (found.state, found.num_networks_done, found.num_networks) == ("done", 7, 7)
    assert found.accuracies == pytest.approx({"alone": 90, "distilled": 90, "pruned": 80})


@pytest.mark.parametrize(
    ("command", "what", "names"), [("compare", "variants", ("kd", "at")), ("sweep", "settings", ("lr=0.1", "lr=0.2"))]
)
def test_the_best_of_a_comparison_or_sweep_is_shown(tmp_path, command, what, names):
    best, other = names
    found = {best: (0.9, 0.5), other: (0.8, 0.6), "alone,lr=0.1": (0.95, 0.9)}
    jobs = {f"{command}/{way}/seed{seed}": accuracy for way, (accuracy, _) in found.items() for seed in (0, 1)}
    run_folder(tmp_path / "run", jobs)
    assert only_run(tmp_path).accuracies == pytest.approx({f"best of 2 {what}: {best}": 90})
    for way, (accuracy, validated) in found.items():
        for path in (tmp_path / "run" / command / way).glob("seed*/result.json"):
            path.write_text(json.dumps({"accuracy": accuracy, "validation": {"accuracy": validated}}))
    assert only_run(tmp_path).accuracies == pytest.approx({f"best of 2 {what}: {other}": 80})
    done = [(-9, {"kind": "begin", "command": command}), (-1, {"kind": "end", "command": command, "exit_code": 0})]
    write_events(tmp_path / "run", *done)
    status = only_run(tmp_path)
    assert (status.state, status.num_networks_done, status.num_networks) == ("done", 6, 6)


def test_the_trials_of_a_search_are_counted(tmp_path):
    run = run_folder(tmp_path / "run", {"search/final/trial0007/seed0": 0.9})
    done = [(-9, {"kind": "begin", "command": "search"}), (-1, {"kind": "end", "command": "search", "exit_code": 75})]
    write_events(run, *done)
    record = {"counts": {"complete": 5, "pruned": 3, "running": 1, "absurd": 4}, "num_trials": 40, "best": 7}
    (run / "search" / "results.json").write_text(json.dumps(record))
    status = only_run(tmp_path)
    assert status.trials == {"complete": 5, "pruned": 3, "running": 1, "planned": 40, "best": 7}
    assert (status.state, status.num_networks_done, status.accuracies) == ("stopped early", 1, {})
    final = {"rows": [{"name": "recipe", "accuracy_mean": 80.0}, {"name": "best", "accuracy_mean": 90.5}]}
    (run / "search" / "results.json").write_text(json.dumps(record | {"final": final}))
    assert only_run(tmp_path).accuracies == {"search's best": 90.5}
    shown = kdpipe_here("status", tmp_path).stdout
    assert "9/40: 5 complete, 3 pruned, 1 running, best 7" in " ".join(shown.split())
    (run / "search" / "results.json").write_text(json.dumps({"counts": [1], "best": -1, "final": {"rows": [3]}}))
    assert (only_run(tmp_path).trials, only_run(tmp_path).accuracies) == ({}, {})


def test_a_run_size_excludes_its_stores(tmp_path, made):
    run = run_folder(tmp_path / "run")
    (run / "more").write_bytes(bytes(1000))
    made.path.rename(run / "store.zarr")
    found = read_status(run)
    assert found.runs[0].disk_bytes == 1000 + (run / "recipe.json").stat().st_size
    assert found.stores[0].disk_bytes == sum(
        file.stat().st_size for file in (run / "store.zarr").rglob("*") if file.is_file()
    )


def test_a_store_shows_its_units_and_who_computes_them(tmp_path, made):
    store = read_status(tmp_path).stores[0]
    num_units = store.num_units
    assert (store.state, store.num_units_done) == ("finished", num_units)
    assert (store.num_views, store.num_samples) == (
        made.manifest.layout.num_views,
        made.manifest.layout.num_samples,
    )
    (made.path / "markers/c/0/0/0").unlink()
    assert (read_status(tmp_path).stores[0].state, read_status(tmp_path).stores[0].num_units_done) == (
        "unfinished",
        num_units - 1,
    )
    claimed = claim(made.path, "v0-s0")
    store = read_status(tmp_path).stores[0]
    claimed.release()
    assert store.state == "being filled"
    assert store.at_work[0].startswith(f"view 0, shard 0: process {os.getpid()} on")


def test_the_most_recently_active_run_comes_first(tmp_path):
    for number, name in enumerate(("b", "c", "a")):
        write_events(run_folder(tmp_path / name), (0, {"kind": "end", "exit_code": 0}), at=time.time() - 1000 + number)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (0, 0))
    assert [Path(run.path).name for run in read_status(tmp_path).runs] == ["a", "c", "b"]


def test_status_writes_nothing(tmp_path, made):
    run = run_folder(tmp_path / "run")
    write_events(run, (-1, progress(1)))
    (run / ".kdpipe.lock").write_text("")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_status(tmp_path)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_only_the_tail_of_a_huge_log_is_read(tmp_path):
    run = run_folder(tmp_path / "run")
    write_events(run, (-1, progress(300)))
    line = (run / "events.jsonl").read_bytes()
    with (run / "events.jsonl").open("r+b") as file:
        file.truncate(10 * 2**30)  # a sparse file
        file.seek(0, 2)
        file.write(b"\n" + line)
    assert only_run(tmp_path).step == 300


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe\n",
        b"[" * 60_000,
        b'{"time": "2026-01-01T00:00:00Z", "step": -1, "total": 1e999, "pid": [], "host": {}, "job": "\\u001b[31m"}\n',
        b'{"time": "9999-12-31T23:59:59+00:00", "step": 10, "total": 0, "pid": 1}\n',
        b'{"time": "0001-01-01T00:00:00+14:00"}\n',
        b'{"time": 5}\n[1]\nnull\n"x"\n',
        b'{"time": "2026-01-01T00:00:00Z", "kind": "end", "exit_code": "zero"}\n',
        b"",
    ],
)
def test_untrusted_events_are_harmless(tmp_path, capsys, raw):
    run = run_folder(tmp_path / "run")
    (run / "events.jsonl").write_bytes(raw)
    assert "run" in text_of(capsys, tmp_path)
    json.dumps(read_status(tmp_path).to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "\x1b]0;x\x07", "data": 0, "student": 0, "compress": 0},
        {"name": [], "data": {}, "student": {"seeds": ["../../../x\0"]}, "compress": {"steps": []}},
        {
            "name": "x",
            "data": {},
            "student": {"seeds": [0]},
            "compress": {"steps": ["quantize"], "quantize": {"scheme": "../x"}},
        },
        {"name": "x", "data": {}, "student": {"seeds": [0]}, "compress": {"steps": 5, "student": 7}},
        {"name": "x", "data": {}, "student": {"seeds": list(range(100_000))}, "compress": {"steps": []}},
    ],
)
def test_an_untrusted_recipe_is_harmless(tmp_path, capsys, recipe):
    run_folder(tmp_path / "run\x1b[31m", recipe=recipe)
    shown = text_of(capsys, tmp_path)
    assert shown.replace("\n", "").isprintable()
    assert read_status(tmp_path).runs[0].num_networks == 0


@pytest.mark.parametrize(
    "manifest",
    [
        {"schema_version": [], "num_views": 3, "unit_rows": 0, "segments": 5, "finished": 5},
        {"schema_version": 3, "num_views": 2**70, "unit_rows": 1, "segments": [{"num_samples": 1}]},
        {"schema_version": 3, "num_views": 1, "unit_rows": 1, "segments": [None], "arrays": 7},
        {"teacher": {"architecture": "x"}, "data": {"name": "\x1b[31m"}},
    ],
)
def test_an_untrusted_store_is_harmless(tmp_path, capsys, manifest):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps({"attributes": {"kdpipe": manifest}}))
    assert text_of(capsys, tmp_path).replace("\n", "").isprintable()


def test_another_schema_is_shown_and_other_zarr_groups_are_not(tmp_path):
    for name, attributes in (("old.zarr", {"kdpipe": {"schema_version": 1}}), ("other.zarr", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(json.dumps({"attributes": attributes}))
    assert [(Path(store.path).name, store.state) for store in read_status(tmp_path).stores] == [
        ("old.zarr", "another schema")
    ]


def test_pipes_links_and_hidden_folders_are_skipped(tmp_path):
    run = run_folder(tmp_path / "runs" / "run")
    (run / "loop").symlink_to(tmp_path)
    (run / "again").symlink_to(run)
    os.mkfifo(run / "events.jsonl")
    os.mkfifo(tmp_path / "recipe.json")
    os.mkfifo(tmp_path / "zarr.json")
    run_folder(tmp_path / ".hidden" / "run")
    assert [Path(found.path) for found in read_status(tmp_path).runs] == [run]


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch, capsys):
    run_folder(tmp_path / "run")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def refusing(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(status_files.os, "scandir", refusing)
    assert f"cannot read {tmp_path / 'closed'}: Permission denied" in text_of(capsys, tmp_path)
    assert len(read_status(tmp_path).runs) == 1


def test_an_incomplete_search_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_ENTRIES", 20)
    run_folder(tmp_path / "run")
    (tmp_path / "run" / "images").mkdir()
    for number in range(30):
        (tmp_path / "run" / "images" / str(number)).touch()
    found = read_status(tmp_path)
    assert len(found.runs) == 1
    assert "name a subfolder" in found.notes[0]


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a folder"):
        read_status(tmp_path / "file")


def test_an_empty_folder_has_no_runs_and_no_stores(tmp_path, capsys):
    assert "no runs and no stores" in text_of(capsys, tmp_path)


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_output_fits_the_terminal(tmp_path, made, monkeypatch, capsys, columns):
    run = run_folder(tmp_path / "folder" / ("long-name-数" * 6), {"students/distilled-seed0": 0.9876})
    write_events(run, (-11, progress(100, "x " * 50)), (-1, progress(300, "x " * 50)))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with exclusive(run, run / ".kdpipe.lock"):
        shown = text_of(capsys, tmp_path)
    plain = re.sub(r"\x1b\[[0-9]*m", "", shown)
    lines = [line for line in plain.splitlines() if "long-name" not in line]
    assert max(map(cell_len, lines)) <= columns
    for part in ("98.76 %", "running", "made.zarr", "20 steps/s", f"pid {os.getpid()}", str(run.relative_to(tmp_path))):
        assert part in " ".join(plain.split())
    assert "\x1b[32mrunning\x1b[0m" in shown


def test_a_file_or_a_pipe_gets_no_colors(tmp_path, capsys):
    run_folder(tmp_path / "run")
    assert "\x1b" not in text_of(capsys, tmp_path)


def test_help_and_status_import_nothing_heavy(tmp_path):
    run_folder(tmp_path / "run")
    look = (
        "import sys; from pathlib import Path; import kdpipe.pipeline.main\n"
        "kdpipe.pipeline.main.app(['--help'], standalone_mode=False)\n"
        "assert 'rich' not in sys.modules\n"
        "from kdpipe.pipeline.status.scan import read_status; from kdpipe.pipeline.status.table import print_status\n"
        "print_status(read_status(Path(sys.argv[1])))\n"
        "heavy = {'numpy', 'numcodecs', 'zarr', 'torch', 'pydantic', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", look, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "run" in ended.stdout
