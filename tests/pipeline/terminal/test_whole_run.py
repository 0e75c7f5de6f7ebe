"""Position and time left of a whole run."""

from dataclasses import replace

import pytest
from support.tiny_run import CACHE, STUDENT, TEACHER, VIEWS

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.recipe.planned_jobs import planned_jobs
from kdpipe.pipeline.terminal import whole_run
from kdpipe.pipeline.terminal.whole_run import WholeRun
from kdpipe.stages.runtime.events import ProgressEvent

ALL = ("train-teacher", "cache-teacher", "train-student", "compress")
RECIPE = Recipe(
    name="tiny",
    teacher=replace(TEACHER, train=replace(TEACHER.train, epochs=10)),
    student=replace(STUDENT, train=replace(STUDENT.train, epochs=10), seeds=(3, 7)),
    cache=CACHE,
    views=VIEWS,
)


@pytest.fixture
def now(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(whole_run, "time", clock)
    return clock


def event(stage, job, done, total=100):
    return ProgressEvent(stage, job, done, total, "step")


def test_the_jobs_of_a_run_are_known_before(now):
    jobs = planned_jobs(RECIPE, ALL)
    first = ["teacher", "store.zarr", "student alone, seed 3", "student distilled, seed 3"]
    assert [job.name for job in jobs[:4]] == first
    assert [job.name for job in jobs if job.seed == 2][-2:] == ["pruned + INT8, hard labels, seed 7", "export, seed 7"]
    assert len(planned_jobs(RECIPE, ["train-student"])) == 4
    unexported = replace(RECIPE, student=replace(RECIPE.student, export=False))
    assert planned_jobs(unexported, ["compress"]) == []


def test_the_time_left_is_that_of_all_jobs(now):
    run = WholeRun(planned_jobs(RECIPE, ALL[:3]))
    assert (run.position(), run.time_left()) == ("stage 1 of 3", "")
    run.update(event("train-teacher", "teacher", 0))
    now.now = 10.0
    run.update(event("train-teacher", "teacher", 100))
    assert run.left_s() == pytest.approx(41.0)  # a second an epoch: 40 of students, and the store's views
    run.update(event("train-student", "student alone, seed 3", 0))
    now.now = 12.0
    run.update(event("train-student", "student alone, seed 3", 50))
    assert run.position() == "stage 3 of 3, seed 1 of 2"
    assert run.left_s() == pytest.approx(14.0)  # those of its stage take as long
    now.now = 13.0
    assert run.left_s() == pytest.approx(13.0)


def test_jobs_that_are_done_are_passed_over(now):
    run = WholeRun(planned_jobs(RECIPE, ALL))
    run.update(event("train-student", "student distilled, seed 7", 40))  # resumed
    assert (run.position(), run.num_done, run.left_s()) == ("stage 3 of 4, seed 2 of 2", 5, None)
    run.update(event("train-teacher", "not needed", 1, 1))
    run.update(ProgressEvent("data", "scan", 1, 2, "image"))
    assert run.position() == "stage 3 of 4, seed 2 of 2"
    run.update(event("compress", "reads the store", 1, 1))
    assert run.position() == "stage 4 of 4, seed 1 of 2"
