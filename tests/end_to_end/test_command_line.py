"""The command line: exit codes, one sentence for a user error, verbosity, and no heavy imports."""

import json
import re
import subprocess
import sys

import pytest
from support.kdpipe_process import environment, kdpipe, kdpipe_here


def test_help_lists_commands_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom kdpipe.pipeline.main import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'zarr', 'numpy', 'pydantic', 'sklearn', 'onnxruntime'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))"
    )
    command = [sys.executable, "-c", code, "--help"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    for word in ("demo", "train-teacher", "cache-teacher", "train-student", "compress", "run", "report", "store", "75"):
        assert word in ended.stdout
    assert "HEAVY []" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "none.toml"], 2, "cannot read the recipe none.toml"),
        (["run", "RECIPE", "--set", "student.train.rl=1"], 2, "did you mean 'lr'?"),
        (["run", "RECIPE", "--set", "data.name=MINST"], 2, "MNIST"),
        (["run", "RECIPE", "--set", "data.name=npz:none"], 1, "none"),
        (["train-teacher", "RECIPE", "--set", "teacher.model.name=resnet21"], 2, "resnet20"),
        (["train-teacher", "RECIPE", "--set", "teacher.model.weights=none.pt"], 1, "none.pt"),
        (["cache-teacher", "RECIPE"], 1, "kdpipe train-teacher"),
        (["train-student", "RECIPE"], 1, "kdpipe cache-teacher"),
        (["compress", "RECIPE"], 1, "kdpipe"),
        (["report", "none"], 1, "not a run folder"),
        (["store", "info", "none.zarr"], 1, "no store at none.zarr"),
        (["run", "RECIPE", "--set", "student.seeds=[0, 0]"], 2, "it has duplicates"),
        (["run", "RECIPE", "--set", "views.operations.0.padding=8"], 2, "could crop images of 8 x 8 to nothing"),
        (["run", "RECIPE", "--set", "device=cuda:99"], 2, "device"),
        (["run", "RECIPE", "--set", "distill.1.layer=1"], 2, "unknown key 'distill.1.layer'"),
        (["run", "RECIPE", "--set", "distill.0.loss=kdd"], 2, "unknown loss 'kdd'; did you mean 'kd'?"),
        (["train", "RECIPE"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
    ],
)
def test_a_user_error_is_one_sentence_and_an_exit_code(recipe, tmp_path, monkeypatch, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    ended = kdpipe_here(*[str(recipe) if argument == "RECIPE" else argument for argument in arguments])
    assert ended.exit_code == code, ended.stderr
    assert sentence in ended.stderr
    assert ended.stdout == ""
    if code == 1:
        assert ended.stderr.count("\n") == 1
        assert ended.stderr.startswith("kdpipe: error: ")


def test_a_user_error_has_no_traceback_in_a_process(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    ended = kdpipe("run", recipe, "--run", tmp_path / "file" / "run")
    assert ended.returncode == 1
    assert ended.stderr.startswith("kdpipe: error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_json_is_one_document_and_progress_is_json_lines(recipe, tmp_path):
    ended = kdpipe("train-teacher", recipe, "--run", tmp_path / "run", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["teacher"]["num_epochs"] == 6
    events = [json.loads(line) for line in ended.stderr.splitlines()]
    assert {event["stage"] for event in events} == {"train-teacher"}
    assert events[-1]["step"] == events[-1]["total"]


def test_a_report_of_an_unfinished_run_exits_3(recipe, tmp_path):
    kdpipe_here("train-teacher", recipe, "--run", tmp_path / "run")
    ended = kdpipe_here("report", tmp_path / "run", "--no-html")
    assert ended.exit_code == 3
    assert "teacher" in ended.stdout
    assert "student distilled (1 of 1)" in ended.stdout


def test_store_info_shows_teacher_and_arrays(recipe, tmp_path):
    run = tmp_path / "run"
    for stage in ("train-teacher", "cache-teacher"):
        assert kdpipe_here(stage, recipe, "--run", run).exit_code == 0
    info = json.loads(kdpipe_here("store", "info", run / "store.zarr", "--json").stdout)
    assert info["num_views"] == 30
    assert info["num_units_done"] == info["num_units"] == 30
    assert set(info["arrays"]) == {"logits", "features/stage2"}
    assert info["teacher"]["architecture"]["model"] == "cnn"
    shown = kdpipe_here("store", "info", run / "store.zarr").stdout
    assert info["fingerprint"] in shown
    assert "features/stage2 float16 [30, 200, 16, 4, 4]" in shown


def test_version_is_printed():
    ended = kdpipe_here("--version")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert re.fullmatch(r"kdpipe \d+\.\d+\.\d+\S*( \(commit .*\))?\n", ended.stdout)


@pytest.mark.parametrize("quiet", [["-q", "train-teacher", "RECIPE"], ["train-teacher", "RECIPE", "--quiet"]])
def test_quiet_prints_only_results(recipe, tmp_path, quiet):
    arguments = [str(recipe) if argument == "RECIPE" else argument for argument in quiet]
    ended = kdpipe_here(*arguments, "--run", tmp_path / "run", "--set", "teacher.train.epochs=1")
    assert ended.exit_code == 0
    assert ended.stderr == ""
    assert "train-teacher is done" in ended.stdout


def test_verbose_adds_phase_times_and_tracebacks(recipe, tmp_path):
    arguments = ("train-teacher", recipe, "--run", tmp_path / "run", "--set", "teacher.train.epochs=1")
    assert "debug: train-teacher: " in kdpipe_here(*arguments, "-v").stderr
    assert "debug" not in kdpipe_here(*arguments).stderr
    refused = kdpipe_here("-v", *arguments[:-1], "student.nonsense=1")
    assert refused.exit_code == 2
    assert "Traceback" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("kdpipe: error: ")


def test_verbose_and_quiet_exclude_each_other(recipe):
    ended = kdpipe_here("train-teacher", recipe, "-v", "-q")
    assert ended.exit_code == 2
    assert "exclude each other" in ended.stderr
