"""Many students of one recipe, trained by several jobs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import RECIPE

from kdpipe.pipeline.commands.variants import trainings
from kdpipe.pipeline.commands.variants.compare import run_compare
from kdpipe.pipeline.run import Run
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.runtime.events import WARNING, ProgressEvent, RunMonitor
from kdpipe.stages.train_student.compare import CompareEntry
from kdpipe.store import LockedError, exclusive

COMPARED = replace(RECIPE, distill=(), compare={"kd": CompareEntry(distill=(KD(loss="kd"),))})


@pytest.fixture(autouse=True)
def untried(without_onnx: None) -> None:
    pass


def test_a_comparison_takes_what_another_job_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[ProgressEvent] = []
    run = Run(COMPARED, tmp_path / "run", RunMonitor(events.append))
    run.begin()
    busy = {trainings.run_of(run.folder, "compare", "kd", 0).job_dir.path}

    def locked_by_another(folder: Path, path: Path, **more: Any) -> AbstractContextManager[None]:
        if folder in busy:
            raise LockedError("another job trains it")
        return exclusive(folder, path, **more)

    monkeypatch.setattr(trainings, "exclusive", locked_by_another)
    monkeypatch.setattr(trainings.time, "sleep", lambda seconds: busy.clear())
    found = run_compare(run)
    assert [row["name"] for row in found["rows"]] == ["alone", "kd"]
    assert [event.job for event in events if event.unit == WARNING and "this one waits" in event.job] != []
    assert not busy


def test_a_diverged_training_is_counted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(config, seed, spec, context, **more):  # type: ignore[no-untyped-def]
        if spec is not None:
            raise NotFiniteError("the loss is nan")
        return train_student(config, seed, spec, context, **more)

    train_student = trainings.train_student
    monkeypatch.setattr(trainings, "train_student", diverges)
    run = Run(COMPARED, tmp_path / "run", RunMonitor())
    run.begin()
    found = run_compare(run)
    assert [row["name"] for row in found["rows"]] == ["alone"]
    assert found["num_diverged"] == {"kd": 1}
