"""`kdpipe sweep`: many settings from one store, killed and resumed, and shared by two processes."""

import csv
import json
import signal

import pytest
from support.compare_runs import differing_files
from support.kdpipe_process import RECIPE, kdpipe_here, signal_when, start

SWEEP = ("--set", "student.train.lr=0.02,0.1", "--set", "distill.0.temperature=1,4", "--set", "student.seeds=[0,1]")
QUICK = ("teacher.train.epochs=2", "student.train.epochs=1", "views.num_views=1")
UNEXPORTED = ("teacher.export=false", "student.export=false")
SHORT = tuple(part for change in (*QUICK, *UNEXPORTED) for part in ("--set", change))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def swept(recipe, tmp_path_factory):
    """A sweep by two processes, one of which is killed in its first student."""
    run = tmp_path_factory.mktemp("swept") / "run"
    first, second = (start("sweep", recipe, "--run", run, *SWEEP, *SHORT) for _ in range(2))
    signal_when(first, lambda: any((run / "sweep").glob("*/seed*/checkpoint.safetensors")), signal.SIGKILL)
    ended = [process.communicate() for process in (first, second)]
    assert first.returncode == -signal.SIGKILL and second.returncode == 0, ended
    return run, ended[1][0]


def test_all_settings_are_compared_with_a_student_alone(swept):
    run, printed = swept
    found = json.loads((run / "sweep" / "results.json").read_text())
    assert len(found["rows"]) == 4 and {len(row["accuracies"]) for row in found["rows"]} == {2}
    assert sorted(path.name for path in (run / "sweep").iterdir() if path.is_dir()) == sorted(
        [f"lr={lr},temperature={temperature}" for lr in (0.02, 0.1) for temperature in (1, 4)]
        + [f"alone,lr={lr}" for lr in (0.02, 0.1)]
    )
    best = max(found["rows"], key=lambda row: row["accuracy_mean"])
    assert found["best"] == best["settings"]
    assert f"{best['accuracy_mean']:.2f}" in printed and "best on the test images: --set student.train.lr=" in printed
    for row in found["rows"]:
        alone = [
            json.loads(
                (
                    run / "sweep" / f"alone,lr={row['settings']['student.train.lr']}" / f"seed{seed}" / "result.json"
                ).read_text()
            )
            for seed in (0, 1)
        ]
        gains = [own - 100 * one["accuracy"] for own, one in zip(row["accuracies"], alone, strict=True)]
        assert row["gains"] == pytest.approx(gains)


def test_the_tables_have_the_same_figures(swept):
    folder = swept[0] / "sweep"
    found = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader((folder / "results.csv").open()))
    for row, line in zip(found["rows"], rows, strict=True):
        assert float(line["accuracy_mean"]) == row["accuracy_mean"]
        assert float(line["student.train.lr"]) == row["settings"]["student.train.lr"]
        for name in ("results.md", "results.tex"):
            assert f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}" in (folder / name).read_text(), name


def test_one_process_or_a_run_gives_the_same_files(swept, recipe, tmp_path):
    run = tmp_path / "run"
    ended = kdpipe_here("sweep", recipe, "--run", run, *SWEEP, *SHORT, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert differing_files(run, swept[0]) == []
    assert json.loads(ended.stdout)["best"] == json.loads((run / "sweep" / "results.json").read_text())["best"]
    single = ("--set", "student.train.lr=0.1", "--set", "distill.0.temperature=4", "--set", "student.seeds=[1]")
    ended = kdpipe_here("train-student", recipe, "--run", run, *single, *SHORT)
    assert ended.exit_code == 0, ended.stderr
    weights = "model.safetensors"
    for own, swept_too in (("distilled-seed1", "lr=0.1,temperature=4"), ("alone-seed1", "alone,lr=0.1")):
        assert (run / "students" / own / weights).read_bytes() == (
            run / "sweep" / swept_too / "seed1" / weights
        ).read_bytes()


def test_a_recipe_without_values_is_refused_with_an_example(recipe, tmp_path):
    ended = kdpipe_here("sweep", recipe, "--run", tmp_path / "run")
    assert ended.exit_code == 2
    assert "--set student.train.lr=0.05,0.1" in ended.stderr
