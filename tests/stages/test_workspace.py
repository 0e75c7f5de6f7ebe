"""Tests of the folder of runs that share what they make."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.runtime.distributed import ProcessGroup
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.workspace import NOWHERE, Workspace, workspace_of


def test_a_waiting_run_stops_at_a_signal(tmp_path: Path) -> None:
    workspace, inputs = Workspace(tmp_path), {"seed": 0}
    said: list[str] = []
    monitor = RunMonitor(lambda event: said.append(event.job), lambda: bool(said))
    with (
        workspace.turn("train-teacher", "teacher", inputs, RunMonitor()),
        pytest.raises(StoppedEarly),
        workspace.turn("train-teacher", "teacher", inputs, monitor),
    ):
        pass
    assert said[0].startswith("waits for the teacher that process ")
    with workspace.turn("train-teacher", "teacher", inputs, monitor):  # free again
        pass
    assert list(tmp_path.iterdir()) == []


def test_all_processes_of_a_job_wait_together(tmp_path: Path) -> None:
    """The first one asks, and all of them look at the stop flag: none waits at a barrier for hours."""
    others, asked, looked = ExitStack(), [], []

    class Two(ProcessGroup):
        def on_main(self, work: Callable[[], Any]) -> Any:
            asked.append(result := work() if self.is_main else "process 7 on box")
            return result

        def check_stop(self, monitor: RunMonitor) -> None:
            looked.append(self.rank)
            others.close()
            if not self.is_main:
                raise StoppedEarly

    workspace, inputs = Workspace(tmp_path), {"seed": 0}
    others.enter_context(workspace.turn("train-teacher", "teacher", inputs, RunMonitor()))
    with workspace.turn("train-teacher", "teacher", inputs, RunMonitor(), Two(0, 2)):
        assert looked == [0]
        assert str(asked[0]).startswith("process ") and asked[1] is None
    with pytest.raises(StoppedEarly), workspace.turn("train-teacher", "teacher", inputs, RunMonitor(), Two(1, 2)):
        pass


def test_other_work_and_other_workspaces_do_not_wait(tmp_path: Path) -> None:
    monitor = RunMonitor(should_stop=lambda: True)
    with Workspace(tmp_path).turn("train-teacher", "teacher", {"seed": 0}, RunMonitor()):
        for workspace, seed in ((Workspace(tmp_path), 1), (NOWHERE, 0), (Workspace(tmp_path / "absent"), 0)):
            with workspace.turn("train-teacher", "teacher", {"seed": seed}, monitor):
                pass


def test_runs_are_found_in_subfolders_too(tmp_path: Path) -> None:
    for name in ("a", "b", "b/generation1", "c/d", "c/d/too/deep", "elsewhere.zarr"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.json").write_text("{}")
    found = Workspace(tmp_path).beside(str(tmp_path / "e" / "store.zarr"), "s3://bucket/store.zarr", None)
    names = [str(run.relative_to(tmp_path)) for run in found.runs(tmp_path / "a")]
    assert names == ["e", "b", "b/generation1", "c/d"]


def test_the_workspace_is_the_folder_of_the_run_or_the_named_one(tmp_path: Path) -> None:
    assert workspace_of(tmp_path / "a", None) == workspace_of(tmp_path / "a", "") == Workspace(tmp_path)
    assert workspace_of(tmp_path / "a" / "b", str(tmp_path)) == Workspace(tmp_path)
    assert workspace_of(tmp_path / "a", "none") == NOWHERE
    with pytest.raises(RunError, match="absent: this is not a folder"):
        workspace_of(tmp_path / "a", "absent")
