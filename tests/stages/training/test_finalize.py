"""What a finished training leaves where its network cannot be exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_run import STUDENT, TEACHER, TRAIN, squares, tiny_context

from kdpipe.pipeline.steps import compress_student, train_student, train_teacher
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.evaluation.main_metric import deciding, main_value
from kdpipe.stages.export import onnx_export
from kdpipe.stages.runtime.events import WARNING, ProgressEvent, RunMonitor
from kdpipe.stages.training import preflight
from kdpipe.stages.training.finalize import min_agreement


@pytest.mark.parametrize(("num_images", "may_differ"), [(10, 0), (20, 1), (40, 2), (90, 2), (200, 2), (1000, 10)])
def test_few_images_may_always_differ(num_images: int, may_differ: int) -> None:
    for num_wrong in (may_differ, may_differ + 1):
        accepted = 1 - num_wrong / num_images >= min_agreement(num_images) - 1e-9
        assert accepted == (num_wrong == may_differ)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 100)


@pytest.mark.usefixtures("small_limit")
def test_teacher_beyond_the_limit_has_no_onnx_file(tmp_path: Path) -> None:
    warnings: list[str] = []

    def report(event: ProgressEvent) -> None:
        if event.unit == WARNING:
            warnings.append(event.job)

    config = replace(TEACHER, train=replace(TRAIN, epochs=1))
    figures = train_teacher(config, 0, tiny_context(tmp_path, RunMonitor(report)))
    assert (figures["onnx_bytes"], figures["onnx_agreement"]) == (None, None)
    assert (tmp_path / "teacher" / "model.safetensors").exists()
    assert not (tmp_path / "teacher" / "model.onnx").exists()
    assert [line for line in warnings if "no ONNX file of the teacher" in line and "GiB, and a file holds 2" in line]


@pytest.mark.usefixtures("small_limit")
def test_student_beyond_the_limit_is_refused_untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_passed", set())  # another test may have tried the same network
    with pytest.raises(ModelError, match=r"a file holds 2.*student\.export = false"):
        train_student(STUDENT, 0, None, tiny_context(tmp_path))
    assert not list(tmp_path.iterdir())
    figures = train_student(replace(STUDENT, export=False), 0, None, tiny_context(tmp_path))
    assert figures["onnx_bytes"] is None


def test_student_without_onnx_file_gets_it_later(tmp_path: Path) -> None:
    config = replace(STUDENT, train=replace(TRAIN, epochs=1))
    later, at_once = tiny_context(tmp_path / "later"), tiny_context(tmp_path / "at-once")
    assert train_student(replace(config, export=False), 0, None, later)["onnx_bytes"] is None
    with pytest.raises(RecipeError, match=r"student\.export = false"):
        compress_student(CompressConfig(), replace(config, export=False), 0, None, later)  # type: ignore[arg-type]
    figures = train_student(config, 0, None, later)
    assert {**figures, "wall_s": 0} == {**train_student(config, 0, None, at_once), "wall_s": 0}
    file = Path("students", "alone-seed0", "model.onnx")
    assert (later.run_dir / file).read_bytes() == (at_once.run_dir / file).read_bytes()


@pytest.mark.usefixtures("without_onnx")
def test_validation_images_are_those_of_each_epoch(tmp_path: Path) -> None:
    """The test images are evaluated at the end alone, and without validation images nothing else is recorded."""
    plain = tiny_context(tmp_path / "plain")
    config = replace(TEACHER, train=replace(TRAIN, epochs=2))
    validation = replace(squares(60, 5), split="validation")
    made = {
        name: train_teacher(config, 0, context)
        for name, context in (
            ("plain", plain),
            ("validated", replace(plain, run_dir=tmp_path / "validated", validation_set=validation)),
        )
    }
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "teacher/metrics.jsonl").read_text().splitlines()]
        for name in made
    }
    assert not any("split" in line for line in lines["plain"]) and "validation" not in made["plain"]
    assert [line["split"] for line in lines["validated"]] == ["validation"] * 2
    assert made["validated"]["accuracy"] == made["plain"]["accuracy"] == lines["plain"][-1]["accuracy"]
    found = made["validated"]["validation"]
    assert (found["num_images"], found["accuracy"]) == (60, lines["validated"][-1]["accuracy"])
    assert made["validated"]["best_accuracy"] == max(line["accuracy"] for line in lines["validated"])
    assert main_value(deciding(made["validated"])) == found["accuracy"]
    assert main_value(deciding(made["plain"])) == made["plain"]["accuracy"]
