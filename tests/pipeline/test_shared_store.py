"""Tests of what a run takes from other runs of its workspace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.made_store import folder_bytes
from support.tiny_run import CACHE, RECIPE

from kdpipe.pipeline import run_stages, steps
from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.run import Run
from kdpipe.stages.cache_teacher.cache import CacheJob
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.workspace import NOWHERE, Workspace, store_of_run
from kdpipe.store import FingerprintMismatch, StoreError
from kdpipe.store.fs.checksums import SUMS, damages


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the trainings, and the units that teachers compute."""
    counts = {"train": 0, "units": 0}
    train, fill = steps.train, steps.fill_store

    def counted_train(*arguments: object) -> object:
        counts["train"] += 1
        return train(*arguments)

    def counted_fill(job: CacheJob, units: object) -> dict[str, object]:
        figures = fill(job, units)
        counts["units"] += figures["num_units_computed"]
        return figures

    monkeypatch.setattr(steps, "train", counted_train)
    monkeypatch.setattr(steps, "fill_store", counted_fill)
    return counts


def run_here(folder: Path, recipe: Recipe = RECIPE, *, workspace: Workspace | None = None) -> tuple[Run, list[str]]:
    """Train a teacher, fill the store and train the students of a recipe; return the run and its events."""
    said: list[str] = []
    run = Run(
        recipe,
        folder,
        RunMonitor(lambda event: said.append(event.job)),
        workspace=workspace or Workspace(folder.parent),
    )
    run.begin()
    run_stages.run_train_teacher(run)
    run_stages.run_cache_teacher(run, in_turn=True)
    run_stages.run_train_student(run)
    run.write_recipe()
    return run, said


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that is done, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        from kdpipe.stages.training import finalize, preflight

        patch.setattr(preflight, "try_export", lambda model, image_shape: None)
        patch.setattr(finalize, "export_onnx", lambda model, example, path, metadata: path.write_bytes(b"no file"))
        patch.setattr(finalize, "require_agreement", lambda path, network, test: SimpleNamespace(agreement=1.0))
        folder = tmp_path_factory.mktemp("first") / "a"
        run_here(folder)
        yield folder


def test_a_second_recipe_trains_its_student_only(
    first: Path, tmp_path: Path, without_onnx: None, counted: dict[str, int]
) -> None:
    shutil.copytree(first, tmp_path / "a")
    other = replace(RECIPE, name="other", distill=(KD(loss="kd", temperature=2.0),))
    run, said = run_here(tmp_path / "b", other)
    assert counted == {"train": 1, "units": 0}
    a = tmp_path / "a"
    assert [one for one in said if one.startswith("uses")] == [
        f"uses the teacher of {a}",
        f"uses the store {a / 'store.zarr'}",
        f"uses the student alone, seed 0 of {a}",
    ]
    assert run.store == a / "store.zarr" == store_of_run(run.folder)
    alone, _ = run_here(tmp_path / "alone" / "b", other, workspace=NOWHERE)
    for place in ("teacher", "students/alone-seed0", "students/distilled-seed0"):
        own, shared = (folder_bytes(one.folder / place) for one in (alone, run))
        assert {name: raw for name, raw in own.items() if name.endswith(".safetensors")} == {
            name: raw for name, raw in shared.items() if name.endswith(".safetensors")
        }


def test_the_run_that_made_a_network_is_named(
    first: Path, tmp_path: Path, without_onnx: None, counted: dict[str, int]
) -> None:
    here, moved = tmp_path / "here", tmp_path / "moved"
    shutil.copytree(first, here / "z")
    run_here(here / "a")  # is looked at before z
    shutil.copytree(here, moved)
    for folder, maker in ((here, "z"), (moved, "z"), (here, "a")):
        if maker != "z":
            shutil.rmtree(folder / "z")
        _, said = run_here(folder / "b")
        assert f"uses the teacher of {folder / maker}" in said
        assert f"uses the student distilled, seed 0 of {folder / maker}" in said
        shutil.rmtree(folder / "b")
    assert counted["train"] == 0


class Trained(Exception):
    """A teacher is trained."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("teacher", replace(RECIPE.teacher, train=replace(RECIPE.teacher.train, lr=0.01))),
        ("views", replace(RECIPE.views, seed=7)),
        ("data", replace(RECIPE.data, num_train=90)),
        ("teacher", replace(RECIPE.teacher, expected_accuracy=100.0)),
        ("name", "other"),
    ],
)
def test_another_teacher_is_not_taken_for_it(
    key: str, value: object, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object) -> object:
        raise Trained

    monkeypatch.setattr(steps, "_train_teacher", train)
    run = Run(replace(RECIPE, **{key: value}), tmp_path / "b", RunMonitor(), workspace=Workspace(first.parent))
    run.begin()
    with nullcontext() if key == "name" else pytest.raises(Trained):
        run_stages.run_train_teacher(run)


@pytest.mark.parametrize("num_views", [1, 2])
def test_store_of_another_training_is_refused(num_views: int, first: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, seed=1, cache=replace(CACHE, store=str(first / "store.zarr")))
    recipe = replace(recipe, views=replace(recipe.views, num_views=num_views))
    run = Run(recipe, tmp_path / "b", RunMonitor(), workspace=Workspace(tmp_path))
    run.begin()
    with pytest.raises(FingerprintMismatch, match="seed: stored 0, wanted 1"):
        run_stages.run_train_student(run)


def test_the_teacher_beside_a_named_store_is_used(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a loss reads its weights, or the store lacks something."""
    monkeypatch.setattr(steps, "_train_teacher", None)
    recipe = replace(RECIPE, cache=replace(CACHE, store=str(first / "store.zarr")))
    run = Run(recipe, tmp_path / "b", RunMonitor(), workspace=Workspace(tmp_path))
    run.begin()
    run_stages.run_train_teacher(run)
    assert (run.folder / "teacher" / "model.safetensors").exists()


def test_a_store_with_more_serves_and_one_with_less_does_not(
    first: Path, tmp_path: Path, without_onnx: None, counted: dict[str, int]
) -> None:
    shutil.copytree(first, tmp_path / "a")
    before = folder_bytes(tmp_path / "a" / "store.zarr")
    hint = Hint(loss="hint", layers=(("stage2", "stage2"),), weight=1.0)
    more = replace(RECIPE, views=replace(RECIPE.views, num_views=3), distill=(*RECIPE.distill, hint))
    run, _ = run_here(tmp_path / "more", more)
    assert run.store == run.own_store
    assert folder_bytes(tmp_path / "a" / "store.zarr") == before
    shutil.rmtree(tmp_path / "a" / "store.zarr")
    counted.update(units=0)
    fewer, _ = run_here(tmp_path / "fewer")
    assert counted["units"] == 0
    assert fewer.store == run.own_store


def test_a_store_that_is_gone_is_made_again(first: Path, tmp_path: Path, without_onnx: None) -> None:
    shutil.copytree(first, tmp_path / "a")
    run_here(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    run, said = run_here(tmp_path / "b")
    assert any("is not there" in one for one in said)
    assert run.store == run.own_store
    assert run.own_store.exists()


def test_a_damaged_job_is_not_taken_and_one_of_a_sweep_is(
    first: Path, tmp_path: Path, without_onnx: None, counted: dict[str, int]
) -> None:
    shutil.copytree(first, tmp_path / "a")
    (tmp_path / "a" / "teacher" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "a" / "students" / "alone-seed0" / SUMS).unlink()  # as of an older kdpipe
    (tmp_path / "a" / "sweep").mkdir()
    (tmp_path / "a" / "students" / "distilled-seed0").rename(tmp_path / "a" / "sweep" / "seed0")  # no place of a job
    run_here(tmp_path / "b")
    assert counted["train"] == 3
    (tmp_path / "b" / "students" / "alone-seed0" / "result.json").unlink()  # killed in the training
    (tmp_path / "a" / "sweep" / "lr=1").mkdir()
    for number, name in enumerate(("alone-seed0", "distilled-seed0")):
        shutil.copytree(first / "students" / name, tmp_path / "a" / "sweep" / "lr=1" / f"seed{number}")
    shutil.rmtree(tmp_path / "b" / "students" / "distilled-seed0")
    run_here(tmp_path / "b")
    assert counted["train"] == 3
    for name in ("alone-seed0", "distilled-seed0"):
        assert list(damages(tmp_path / "b" / "students" / name)) == []


def test_train_student_uses_another_run_s_store(
    first: Path, tmp_path: Path, without_onnx: None, counted: dict[str, int]
) -> None:
    shutil.copytree(first, tmp_path / "a")
    warmer = replace(RECIPE, distill=(KD(loss="kd", temperature=2.0),))
    run = Run(warmer, tmp_path / "b", RunMonitor(), workspace=Workspace(tmp_path))
    run.begin()
    run_stages.run_train_student(run)
    assert counted == {"train": 1, "units": 0}
    assert store_of_run(tmp_path / "b") == (tmp_path / "a" / "store.zarr").absolute()
    with pytest.raises(StoreError, match="cache-teacher"):
        run_stages.run_train_student(Run(warmer, tmp_path / "c", RunMonitor()))


def test_cache_teacher_alone_uses_the_teacher_of_another_run(
    first: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    shutil.copytree(first, tmp_path / "a")
    more = replace(RECIPE, views=replace(RECIPE.views, num_views=3))
    run = Run(more, tmp_path / "b", RunMonitor(), workspace=Workspace(tmp_path))
    run.begin()
    run_stages.run_cache_teacher(run)
    assert counted["train"] == 0 and counted["units"] > 0
