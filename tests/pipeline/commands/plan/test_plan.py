"""Tests of what `kdpipe plan` finds and estimates."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.tiny_run import RECIPE as TINY
from support.tiny_run import TEACHER

from kdpipe.pipeline import run_stages
from kdpipe.pipeline.commands.plan import printing, probe
from kdpipe.pipeline.commands.plan.existing import find_students
from kdpipe.pipeline.commands.plan.exports import ExportTime
from kdpipe.pipeline.commands.plan.plan import run_plan
from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.recipe.search.config import SearchConfig
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.shared_store import find_teacher
from kdpipe.stages.cohort.config import CohortConfig, CohortMember
from kdpipe.stages.compress import compress as stage
from kdpipe.stages.compress.compress import CompressConfig, fine_tunings
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.train_student.compare import CompareEntry
from kdpipe.stages.training.job_dir import JobDir, write_json_file
from kdpipe.stages.workspace import NOWHERE, Workspace

RECIPE = replace(TINY, student=replace(TINY.student, seeds=(0, 1)), compress=CompressConfig(steps=()))


EXPORT_S = 1e5


@pytest.fixture(autouse=True)
def untried(without_onnx: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "try_export", lambda model, image_shape, opset=None: None)
    monkeypatch.setattr(probe, "time_export", lambda network, image_shape, opset: ExportTime(EXPORT_S, 0.0))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def planned(folder: Path, recipe: Recipe = RECIPE, workspace: Workspace = NOWHERE) -> dict:
    return run_plan(Run(recipe, folder, RunMonitor(), workspace=workspace, keeps_images=False), with_probe=True)


def test_a_plan_tells_every_stage_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "new", replace(RECIPE, compress=CompressConfig()))
    made = {stage["what"]: (stage["count"], stage["num_done"]) for stage in plan["stages"]}
    assert made == {
        "teacher": (1, 0),
        "store": (1, 0),
        "students, alone": (2, 0),
        "students, distilled": (2, 0),
        "networks (prune, quantize)": (14, 0),
    }
    ends = [stage["wall_s"] for stage in plan["stages"]]
    exports = [low // EXPORT_S for low, _ in ends]  # the rest is little; 8 of the 14 have files, twice
    assert exports == [1, 0, 2, 2, 16]
    assert all(0 < low < high for low, high in ends)
    assert plan["wall_s"] == pytest.approx([sum(low for low, _ in ends), sum(high for _, high in ends)], rel=0.02)
    assert sum(plan["data"]["train"]["classes"].values()) == plan["data"]["train"]["num_samples"] == 64
    assert list(tmp_path.iterdir()) == []
    lines = printed(plan, monkeypatch)
    assert all(len(line) <= 80 or " /" in line for line in lines), lines
    assert any("students, distilled" in line and " s" in line for line in lines)
    assert any("10 classes: 0: " in line for line in lines)


def printed(plan: dict, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out = io.StringIO()
    monkeypatch.setattr(printing, "console", lambda: Console(file=out, width=80, markup=False, highlight=False))
    printing.print_plan(plan)
    return out.getvalue().splitlines()


def test_a_plan_finds_what_the_workspace_offers(tmp_path: Path) -> None:
    done = Run(RECIPE, tmp_path / "a", RunMonitor())
    promised = run_plan(done, with_probe=False)["missing_bytes"]
    done.begin()
    for run_stage in (run_stages.run_train_teacher, run_stages.run_cache_teacher, run_stages.run_train_student):
        run_stage(done)
    outputs = (path for path in tmp_path.glob("a/store*.zarr/logits/c/**/*") if path.is_file())
    assert sum(path.stat().st_size for path in outputs) == promised
    shutil.rmtree(tmp_path / "a" / "students" / "distilled-seed1")
    plan = planned(tmp_path / "b", workspace=Workspace(tmp_path))
    assert plan["store"] == str(tmp_path / "a" / "store.zarr")
    assert plan["teacher"]["found"] == str(tmp_path / "a")
    assert [(stage["count"], stage["num_done"]) for stage in plan["stages"]] == [(1, 1), (1, 1), (2, 2), (2, 1)]
    assert [stage["wall_s"][1] > 0 for stage in plan["stages"]] == [False, False, False, True]
    assert not (tmp_path / "b").exists()
    weights = str(tmp_path / "a" / "teacher" / "model.safetensors")
    given = replace(TEACHER, model=replace(TEACHER.model, weights=weights), train=None, mean=(0.3,), std=(0.4,))
    plan = planned(tmp_path / "b", replace(RECIPE, teacher=given, compress=CompressConfig(steps=())))
    assert plan["teacher"]["normalization"] == {"mean": [0.3], "std": [0.4]}
    assert plan["teacher"]["notes"].startswith("it reaches ")
    assert find_teacher(Run(RECIPE, tmp_path / "b", RunMonitor())) is None
    other = replace(RECIPE, distill=(KD(loss="kd", temperature=2.0),))
    run = Run(other, tmp_path / "b", RunMonitor(), workspace=Workspace(tmp_path))
    assert list(find_students(run, tmp_path / "a" / "store.zarr")) == [("alone", 0), ("alone", 1)]


def test_the_plan_of_a_sweep_has_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two temperatures, two lengths and two seeds: the students alone have no temperature."""
    swept = replace(RECIPE, sweep={"distill.0.temperature": [1.0, 2.0], "student": {"train": {"epochs": [1, 3]}}})
    done = tmp_path / "a" / "sweep" / "temperature=1.0,epochs=3" / "seed0"
    monkeypatch.setattr(JobDir, "result", lambda job_dir: {} if job_dir.path == done else None)
    plan = planned(tmp_path / "a", swept)
    made = {stage["what"]: (stage["count"], stage["num_done"]) for stage in plan["stages"]}
    assert made == {"teacher": (1, 0), "store": (1, 0), "students, alone": (4, 0), "students, 4 settings": (8, 1)}
    assert all(stage["wall_s"][0] > 0 for stage in plan["stages"])


def test_the_plan_of_a_search_has_its_trials(tmp_path: Path) -> None:
    search = SearchConfig(space={"distill": {"0": {"temperature": [1.0, 2.0]}}}, trials=9)
    searched = replace(RECIPE, search=search, data=replace(RECIPE.data, validation_share=0.2))
    (tmp_path / "a" / "search").mkdir(parents=True)
    write_json_file(tmp_path / "a" / "search" / "results.json", {"counts": {"complete": 2, "pruned": 2, "running": 1}})
    plan = planned(tmp_path / "a", searched)
    made = {stage["what"]: (stage["count"], stage["num_done"]) for stage in plan["stages"]}
    trials = {"students, 9 trials": (9, 4), "students, alone, at the end": (2, 0)}
    assert made == {"teacher": (1, 0), "store": (1, 0), **trials, "students, distilled, at the end": (6, 0)}


def test_the_plan_of_a_cohort_has_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelConfig(name="cnn", args={"width": 3})
    members = tuple(CohortMember(model=model) for model in (RECIPE.student.model, other))
    done = tmp_path / "a" / "students" / "cohort-ensemble-seed1"
    monkeypatch.setattr(JobDir, "result", lambda job_dir: {} if job_dir.path == done else None)
    for config in (CohortConfig(members=members), CohortConfig(method="one", branch_at="stage2")):
        plan = planned(tmp_path / "a", replace(RECIPE, distill=(), cohort=config))
        made = {stage["what"]: (stage["count"], stage["num_done"]) for stage in plan["stages"]}
        others = {} if config.method == "one" else {"other members, alone": (2, 0)}
        assert made == {**others, "cohorts of 2": (2, 1), "students, alone": (2, 0)}
        assert all(stage["wall_s"][0] > 0 for stage in plan["stages"])


def test_the_plan_of_a_comparison_has_its_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"kd": CompareEntry(distill=(KD(loss="kd"),)), "smooth": CompareEntry(label_smoothing=0.1)}
    compared = replace(RECIPE, distill=(), compare=entries)
    done = tmp_path / "a" / "compare" / "kd" / "seed0"
    monkeypatch.setattr(JobDir, "result", lambda job_dir: {} if job_dir.path == done else None)
    plan = planned(tmp_path / "a", compared)
    made = {stage["what"]: (stage["count"], stage["num_done"]) for stage in plan["stages"]}
    assert made == {"teacher": (1, 0), "store": (1, 0), "students, variants (2)": (4, 1), "students, alone": (2, 0)}
    assert all(stage["wall_s"][0] > 0 for stage in plan["stages"])


def test_the_number_of_fine_tunings_follows_the_recipe() -> None:
    config = CompressConfig(prune=PruneConfig(steps=3, epochs_per_step=4), baselines=False)
    jobs = fine_tunings(config)
    assert list(jobs) == ["pruned", "int8"]
    assert jobs["pruned"][0].epochs == config.prune_train.epochs + 8
    assert fine_tunings(CompressConfig())["int8-ptq"][0].epochs == 0
