"""`kdpipe cohort` on digits: killed and resumed, shown by report and status, and used as a teacher."""

import json
import signal

import pytest
from support.kdpipe_process import RECIPE, kdpipe_here, signal_when, start

COHORT = """
[cohort]
method = "kdcl"
with_teacher = true
keep = "ensemble"
"""
QUICK = ("teacher.train.epochs=2", "student.train.epochs=2", "views.num_views=2", "student.seeds=[0,1]")
SHORT = tuple(part for change in (*QUICK, "teacher.export=false", "student.export=false") for part in ("--set", change))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE + COHORT)
    return path


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A cohort that was killed in its training, and run again."""
    run = tmp_path_factory.mktemp("cohort") / "run"
    for command in ("train-teacher", "cache-teacher"):
        ended = kdpipe_here(command, recipe, "--run", run, *SHORT)
        assert ended.exit_code == 0, ended.stderr
    first = start("cohort", recipe, "--run", run, *SHORT)
    checkpoint = run / "students" / "cohort-ensemble-seed0" / "checkpoint.safetensors"
    signal_when(first, checkpoint.exists, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    ended = kdpipe_here("cohort", recipe, "--run", run, *SHORT, "--json")
    assert ended.exit_code == 0, ended.stderr
    return run, json.loads(ended.stdout)


def accuracies(run, kind):
    found = [json.loads((run / "students" / f"{kind}-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
    return [100 * one["accuracy"] for one in found]


def test_table_has_each_student_alone_and_together(trained):
    run, found = trained
    rows = {row["name"]: row for row in found["rows"]}
    kinds = {"alone": "alone", "member 1": "cohort-1", "member 2": "cohort-2", "ensemble": "cohort-ensemble"}
    for name, kind in kinds.items():
        assert rows[name]["accuracies"] == pytest.approx(accuracies(run, kind))
    both = zip(accuracies(run, "cohort-1"), accuracies(run, "cohort-2"), strict=True)
    assert rows["mean of 2 members"]["accuracies"] == pytest.approx([(one + other) / 2 for one, other in both])
    assert found["kept"]["name"].startswith("ensemble, seed")


def test_killed_cohort_gives_the_same_files(trained, recipe, tmp_path):
    stores = f"student.stores=[{json.dumps(str(trained[0] / 'store.zarr'))}]"
    ended = kdpipe_here("cohort", recipe, "--run", tmp_path / "run", *SHORT, "--set", stores, "--workspace", "none")
    assert ended.exit_code == 0, ended.stderr
    for kind in ("cohort-1", "cohort-2", "cohort-ensemble"):
        own, other = (run / "students" / f"{kind}-seed0" for run in (tmp_path / "run", trained[0]))
        assert (own / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_report_status_and_page_show_it(trained):
    run, found = trained
    ensemble = f"{next(row['accuracy_mean'] for row in found['rows'] if row['name'] == 'ensemble'):.2f}"
    told = kdpipe_here("report", run, "--full")
    assert "cohort by kdcl over 2 seeds" in told.stdout
    assert ensemble in told.stdout and "mean of 2 members" in told.stdout
    page = (run / "report.html").read_text()
    assert "cohort by kdcl" in page
    assert all(f"{name} ends at " in page for name in ("member 1", "member 2", "ensemble"))
    (status,) = json.loads(kdpipe_here("status", run, "--json").stdout)["runs"]
    assert status["state"] == "done" and status["command"] == "cohort"
    assert f"{status['accuracies']['cohort ensemble']:.2f}" == ensemble
    assert "cohort members" in status["accuracies"]


def test_the_ensemble_becomes_a_teacher(trained, tmp_path):
    run, found = trained
    taught = run / "cohort" / "teacher.toml"
    for command in ("train-teacher", "cache-teacher"):
        ended = kdpipe_here(command, taught, "--run", tmp_path / "run")
        assert ended.exit_code == 0, ended.stderr
    kept = json.loads((run / "students" / found["kept"]["folder"].rpartition("/")[2] / "result.json").read_text())
    stored = json.loads((tmp_path / "run" / "store.zarr" / "zarr.json").read_text())["attributes"]
    assert kept["identity"]["weights_sha256"] in json.dumps(stored)
    teacher = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    assert teacher["accuracy"] == kept["accuracy"]


def test_a_recipe_without_a_cohort_is_refused(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    ended = kdpipe_here("cohort", path, "--run", tmp_path / "run")
    assert ended.exit_code == 2
    assert "add a section [cohort]" in ended.stderr
