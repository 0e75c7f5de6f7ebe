"""What `kdpipe clean` shows and removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.made_store import make_store

from kdpipe.pipeline.status.clean import Entry, clean, print_clean
from kdpipe.store import exclusive


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Runs a, b and c with a store each; b names that of a, and c that of b by a relative path."""
    for name, store in (("a", None), ("b", str(tmp_path / "a" / "store.zarr")), ("c", "elsewhere/b/store.zarr")):
        make_store(tmp_path / name / "store.zarr")
        (tmp_path / name / "recipe.json").write_text(json.dumps({"name": name, "cache": {"store": store}}))
        job = tmp_path / name / "students" / "alone-seed0"
        job.mkdir(parents=True)
        (job / "checkpoint.safetensors").write_bytes(bytes(100))
        (job / ".model.onnx.0123abcd.partial").write_bytes(bytes(10))
    make_store(tmp_path / "c" / "store.test.zarr")
    (tmp_path / "a" / "students" / "alone-seed0" / "result.json").write_text("{}")
    return tmp_path


def names(entries: list[Entry], folder: Path) -> list[str]:
    return [str(Path(entry.path).relative_to(folder)) for entry in entries if not entry.is_needed]


def test_what_no_run_needs_is_shown_then_removed(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = [f"{name}/students/alone-seed0/.model.onnx.0123abcd.partial" for name in "abc"]
    unneeded = sorted(["c/store.zarr", "a/students/alone-seed0/checkpoint.safetensors", *partial])
    shown = clean(workspace, remove=False)
    assert sorted(names(shown, workspace)) == unneeded
    assert [len(entry.used_by) for entry in shown if entry.what == "store"] == [2, 1, 0]
    assert all(Path(entry.path).exists() for entry in shown)
    print_clean(workspace, shown)
    printed = capsys.readouterr().out
    assert "--remove" in printed
    users = {line.split()[1]: line.split()[4:] for line in printed.splitlines() if "store.zarr" in line}
    assert users == {"a/store.zarr": ["a,", "b"], "b/store.zarr": ["c"], "c/store.zarr": ["no", "run"]}
    removed = clean(workspace, remove=True)
    assert not any((workspace / name).exists() for name in (*unneeded, "c/store.test.zarr"))
    assert all(Path(entry.path).exists() for entry in removed if entry.is_needed)
    assert (workspace / "b" / "students" / "alone-seed0" / "checkpoint.safetensors").exists()  # not finished
    assert names(clean(workspace, remove=True), workspace) == []


def test_stores_stay_while_a_recipe_cannot_be_read(workspace: Path) -> None:
    run = workspace / "deeper" / "than" / "others"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("damaged")
    clean(workspace, remove=True)
    assert (workspace / "c" / "store.zarr").exists()


def test_nothing_is_removed_from_under_a_job(workspace: Path) -> None:
    with exclusive(workspace / "a", workspace / "a" / ".kdpipe.lock"):
        clean(workspace, remove=True)
    assert (workspace / "c" / "store.zarr").exists()
    assert list((workspace / "a").rglob(".*.partial"))
    assert not list((workspace / "b").rglob(".*.partial"))
