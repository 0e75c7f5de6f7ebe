"""`kdpipe search`: trials from one store by three processes of which one is killed, the winner, and its recipe."""

import json
import signal
import tomllib
from pathlib import Path

import pytest
from support.kdpipe_process import RECIPE, kdpipe_here, signal_when, start

from kdpipe.stages.data.splits import VALIDATION

pytest.importorskip("optuna")

NUM_TRIALS = 6
SEARCH = """
[search]
trials = 6

[search.space]
student.train.lr = { low = 0.02, high = 0.2, log = true }
distill.1.loss = ["hint", "rkd", "off"]
"""
QUICK = ("teacher.train.epochs=2", "student.train.epochs=2", "views.num_views=2", "student.baseline=false")
DATA = ("data.validation_share=0.25", "teacher.export=false")
SHORT = tuple(part for change in (*QUICK, *DATA) for part in ("--set", change))
ENDED = {"complete", "pruned", "fail"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE + SEARCH)
    return path


@pytest.fixture(scope="module")
def searched(recipe, tmp_path_factory):
    """A search by three processes, one of which is killed in its first trial."""
    run = tmp_path_factory.mktemp("searched") / "run"
    trials = run / "search" / "trials"
    workers = [start("search", recipe, "--run", run, *SHORT) for _ in range(3)]
    signal_when(workers[0], lambda: any(trials.glob("*/seed*/checkpoint.safetensors")), signal.SIGKILL)
    ended = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0], ended
    return run, ended[1][0]


def record_of(run):
    return json.loads((run / "search" / "results.json").read_text())


def winner_of(run):
    return run / "search" / "final" / f"trial{record_of(run)['best']:04d}"


def test_every_trial_ends_and_none_is_trained_twice(searched):
    run, printed = searched
    found = record_of(run)
    assert [trial["number"] for trial in found["trials"]] == list(range(NUM_TRIALS))
    assert {trial["state"] for trial in found["trials"]} <= ENDED and found["counts"]["complete"] >= 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = {(event["job"], event["pid"]) for event in events if event.get("unit") == "step"}
    processes = [len({pid for job, pid in steps if job == f"trial {number}, seed 0"}) for number in range(NUM_TRIALS)]
    assert min(processes) == 1 and sum(processes) <= NUM_TRIALS + 1, "only the killed process's trial has two"
    journal = [json.loads(line) for line in (run / "search" / "journal.log").read_text().splitlines()]
    told = [line["trial_id"] for line in journal if line.get("state") in (1, 2, 3)]  # complete, pruned, failed
    assert sorted(told) == list(range(NUM_TRIALS))
    assert "the search's best" in printed and "best of 3 after one epoch" in printed


def test_the_study_is_plain_optuna_s(searched):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    run, _ = searched
    journal = JournalStorage(JournalFileBackend(str(run / "search" / "journal.log")))
    study, found = optuna.load_study(study_name="tiny", storage=journal), record_of(run)
    assert len(study.trials) == NUM_TRIALS and study.best_trial.number == found["best"] == found["final"]["winner"]
    assert study.best_params == found["trials"][found["best"]]["settings"]


def test_trials_are_judged_on_validation_images_alone(searched):
    run, _ = searched
    for job in (run / "search" / "trials").glob("*/seed0"):
        lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
        assert {line["split"] for line in lines} == {VALIDATION}
        if (job / "result.json").exists():
            result = json.loads((job / "result.json").read_text())
            assert result["accuracy"] == pytest.approx(lines[-1]["accuracy"])
            assert json.loads((job / "job.json").read_text())["test"]["split"] == VALIDATION
    final = json.loads((winner_of(run) / "seed0" / "job.json").read_text())
    assert final["test"]["split"] == "test"


def test_the_winner_is_a_recipe_that_uses_the_store(searched, monkeypatch):
    run, _ = searched
    ended = kdpipe_here("recipe", "check", run / "best.toml")
    assert ended.exit_code == 0, ended.stdout + ended.stderr
    monkeypatch.chdir(run.parent)
    ended = kdpipe_here("train-student", run / "best.toml", "--workspace", run.parent)
    assert ended.exit_code == 0, ended.stderr
    own = Path("runs/tiny-best/students/distilled-seed0/model.safetensors")
    assert own.read_bytes() == (winner_of(run) / "seed0" / "model.safetensors").read_bytes()
    assert not Path("runs/tiny-best/store.zarr").exists()
    table = tomllib.loads((run / "best.toml").read_text())
    settings = record_of(run)["trials"][record_of(run)["best"]]["settings"]
    assert table["student"]["train"]["lr"] == settings["student.train.lr"] and "search" not in table


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """A search by one process that stops after each trial or so, and one that does not."""
    folder = tmp_path_factory.mktemp("alone")
    runs = folder / "stopped", folder / "whole"
    process = start("search", recipe, "--run", runs[0], *SHORT, "--workspace", "none")
    checkpoint = runs[0] / "search/trials/0001/seed0/checkpoint.safetensors"
    signal_when(process, checkpoint.exists, signal.SIGTERM)
    assert (process.communicate() and process.returncode) == 75
    for run in runs:
        ended = kdpipe_here("search", recipe, "--run", run, *SHORT, "--workspace", "none", "--json")
        assert ended.exit_code == 0, ended.stderr
    return [record_of(run) for run in runs]


def test_one_worker_makes_the_same_trials_also_if_it_is_stopped(alone):
    stopped, whole = alone
    assert stopped["trials"] == whole["trials"]
    assert stopped["final"] == whole["final"]


def test_failed_trials_and_a_front_of_objectives(recipe, tmp_path):
    space = ("search.space.student.train.lr=[0.05, 1e6]", "search.space.student.model.args.width=[2, 4]")
    more = (*space, "search.space.distill.1.loss=['off']", "search.sampler='grid'", "student.train.epochs=1")
    objective = ("search.objective=['accuracy', 'parameters']", "student.train.warmup_epochs=0")
    options = [part for change in (*more, *objective) for part in ("--set", change)]
    ended = kdpipe_here("search", recipe, "--run", tmp_path / "run", *SHORT, *options)
    assert ended.exit_code == 0, ended.stderr
    found = record_of(tmp_path / "run")
    assert found["counts"] == {"complete": 2, "fail": 2} and "failed: " in ended.stderr
    failed = [trial for trial in found["trials"] if trial["state"] == "fail"]
    assert all(trial["settings"]["student.train.lr"] == 1e6 and trial["why"] for trial in failed)
    small, large = sorted((one["values"] for one in found["trials"] if one["values"]), key=lambda values: values[1])
    assert len(found["front"]) == (2 if small[0] < large[0] else 1) and small[1] < large[1]
    assert "on the front" in ended.stdout and "2 trials failed" in ended.stdout


def test_compressed_trials_have_a_front_of_accuracy_and_size(recipe, tmp_path):
    space = ("search.space.compress.prune.ratio=[0.25, 0.75]", "search.sampler='grid'", "search.compress=true")
    quick = ("compress.steps=['prune']", "compress.prune_train.epochs=1", "student.train.epochs=1", "search.keep=1")
    off = ("search.space.distill.1.loss=['off']", "search.space.student.train.lr=[0.05]")
    more = ("search.objective=['accuracy', 'size', 'latency']", "student.train.warmup_epochs=0")
    options = [part for change in (*space, *quick, *off, *more) for part in ("--set", change)]
    run = tmp_path / "run"
    ended = kdpipe_here("search", recipe, "--run", run, *SHORT, *options)
    assert ended.exit_code == 0, ended.stderr
    found = record_of(run)
    large, small = found["trials"]
    assert small["values"][1] < large["values"][1] and all(one["values"][2] > 0 for one in (small, large))
    for number, one in enumerate((large, small)):
        job = run / f"search/trials/000{number}/seed0/compressed/pruned-seed0"
        own = json.loads((job / "result.json").read_text())
        assert one["values"][:2] == [own["accuracy"], own["onnx_bytes"]]
        assert json.loads((job / "job.json").read_text())["test"]["split"] == VALIDATION
    best, table = found["final"]["rows"][0], tomllib.loads((run / "best.toml").read_text())
    assert best["settings"]["compress.prune.ratio"] == table["compress"]["prune"]["ratio"]
    assert best["objectives"]["size"] == found["trials"][found["best"]]["values"][1]


def test_a_finished_search_goes_on_with_more_trials(searched, recipe):
    run, _ = searched
    before = record_of(run)["trials"]
    ended = kdpipe_here("search", recipe, "--run", run, *SHORT, "--set", f"search.trials={NUM_TRIALS + 2}")
    assert ended.exit_code == 0, ended.stderr
    found = record_of(run)
    assert found["trials"][:NUM_TRIALS] == before and len(found["trials"]) == NUM_TRIALS + 2 and "final" in found


def test_another_space_in_the_same_run_folder_is_refused(searched, recipe):
    ended = kdpipe_here("search", recipe, "--run", searched[0], *SHORT, "--set", "search.sampler='random'")
    assert ended.exit_code == 12
    assert "search.sampler: stored 'tpe', wanted 'random'" in ended.stderr and "kdpipe search" in ended.stderr


def test_a_recipe_without_a_space_is_refused_with_an_example(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    ended = kdpipe_here("search", path, "--run", tmp_path / "run")
    assert ended.exit_code == 2
    assert "distill.0.temperature = { low = 1, high = 20, log = true }" in ended.stderr
