"""Callbacks of a recipe in every command that trains."""

import json
import os
from pathlib import Path

import pytest
from support.kdpipe_process import RECIPE, kdpipe_here

MODULE = """
import json
from kdpipe.stages.runtime.callbacks import Callback

class Diary(Callback):
    def __init__(self, file):
        self.file = file

    def on_run_end(self, state):
        print("a line that must not be in the results")
        line = [state.stage, str(state.folder.relative_to(state.run_dir)), state.epoch, state.config["name"]]
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\\n")

class StopAtOnce(Callback):
    def on_run_start(self, state):
        state.stop()
"""
SHORT = ("--set", "views.num_views=2", "--set", "teacher.train.epochs=2", "--set", "student.train.epochs=2")
CALLBACKS = """
callbacks = ["csv", "python:my_callbacks:StopAtOnce", { name = "python:my_callbacks:Diary", file = "diary.jsonl" }]
"""
VARIANT = """
[compare.at]
distill = [{ loss = "at", layers = [["stage2", "stage2"]] }]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run and a comparison, in the current folder, of a recipe with callbacks."""
    folder, before = tmp_path_factory.mktemp("callbacks"), Path.cwd()
    (folder / "my_callbacks.py").write_text(MODULE)
    (folder / "r.toml").write_text(CALLBACKS + RECIPE + VARIANT)
    os.chdir(folder)
    try:
        ended = [kdpipe_here(command, "r.toml", "--run", "run", *SHORT, "--json") for command in ("run", "compare")]
        lines = (folder / "diary.jsonl").read_text().splitlines()
        ended.append(kdpipe_here("run", "r.toml", "--run", "run", *SHORT))
        assert len((folder / "diary.jsonl").read_text().splitlines()) == len(lines)
    finally:
        os.chdir(before)
    return folder / "run", ended, [json.loads(line) for line in lines]


def test_every_training_of_every_command_calls_them(trained):
    _, ended, lines = trained
    assert [one.exit_code for one in ended] == [0, 0, 0], ended[0].stderr
    assert lines == [
        ["train-teacher", "teacher", 1, "tiny"],
        ["train-student", "students/alone-seed0", 1, "tiny"],
        ["train-student", "students/distilled-seed0", 1, "tiny"],
        ["compress", "compressed/pruned-seed0", 1, "tiny"],
        ["compress", "compressed/int8-seed0", 1, "tiny"],
        ["train-student", "compare/at/seed0", 1, "tiny"],
    ]


def test_prints_of_callbacks_are_not_among_the_results(trained):
    assert all(json.loads(one.stdout) for one in trained[1][:2])


def test_a_stopped_training_is_finished_and_says_by_what(trained):
    run = trained[0]
    for job in ("teacher", "students/distilled-seed0", "compressed/int8-seed0", "compare/at/seed0"):
        result = json.loads((run / job / "result.json").read_text())
        assert (result["num_epochs"], result["stopped_by"]) == (1, "StopAtOnce"), job
        assert len((run / job / "metrics.csv").read_text().splitlines()) == 2
        assert not (run / job / "checkpoint.safetensors").exists()
    status = json.loads(kdpipe_here("status", run.parent, "--json").stdout)
    assert "unfinished" not in json.dumps(status)
