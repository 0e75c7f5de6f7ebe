"""Runs that share what one of them has made."""

from __future__ import annotations

import json
from pathlib import Path

from support.kdpipe_process import start


def test_two_runs_at_once_train_one_teacher_and_fill_one_store(recipe: Path, tmp_path: Path) -> None:
    quick = ["student.export=false", "teacher.export=false", "student.train.epochs=1", "views.num_views=2"]
    sets = [word for change in quick for word in ("--set", change)]
    common = ["run", recipe, *sets, "--workspace", tmp_path]
    runs = [tmp_path / "a", tmp_path / "b"]
    jobs = [start(*common, "--run", run, "--set", f"distill.0.temperature={n}") for n, run in enumerate(runs, 2)]
    ended = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ended
    for place in ("teacher", "students/alone-seed0"):
        one, other = ((run / place / "model.safetensors").stat().st_ino for run in runs)
        assert one == other, place
    stores = sorted(str(run / "store.zarr") for run in runs if (run / "store.zarr").exists())
    used = [json.loads((run / "recipe.json").read_text())["cache"]["store"] for run in runs]
    assert [stores, sorted(map(str, used))] == [[stores[0]], sorted(["None", stores[0]])]
    assert not (tmp_path / ".workspace.locks").exists()
