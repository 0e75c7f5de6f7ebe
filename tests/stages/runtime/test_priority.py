"""Tests of raising the nice value, in subprocesses since it cannot be lowered again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.paths import ROOT
from support.tiny_run import STUDENT, tiny_context

from kdpipe.pipeline import run_stages
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.errors import RunError

SCRIPT = """
import json, os, subprocess, sys, threading
from kdpipe.stages.runtime.cpu import lower_priority

done = threading.Event()
older = threading.Thread(target=done.wait); older.start()
os.setpriority(os.PRIO_PROCESS, older.native_id, int(sys.argv[2]))
lower_priority(int(sys.argv[1]))
newer = threading.Thread(target=done.wait); newer.start()
child = subprocess.run([sys.executable, "-c", "import os; print(os.nice(0))"], capture_output=True, text=True)
threads = {name: os.getpriority(os.PRIO_PROCESS, thread.native_id) for name, thread in
           {"main": threading.main_thread(), "older": older, "newer": newer}.items()}
print(json.dumps(threads | {"child": int(child.stdout)}))
done.set()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")


def nice_values(nice: int, *, older: int = 0, outer: int = 0) -> dict[str, int]:
    """Return relative nice values of a process's threads and child after `lower_priority(nice)`.

    The process starts with nice value `outer` and has a thread with `older`.
    """
    base = os.nice(0)
    numbers = [str(base + nice if nice else 0), str(base + max(older, outer))]
    command = ["nice", "-n", str(outer), sys.executable, "-c", SCRIPT, *numbers]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return {name: value - base for name, value in json.loads(done.stdout).items()}


def test_all_threads_and_later_children_are_niced() -> None:
    assert nice_values(4) == {"main": 4, "older": 4, "newer": 4, "child": 4}


def test_higher_nice_values_are_kept() -> None:
    assert nice_values(4, older=6) == {"main": 4, "older": 6, "newer": 4, "child": 4}
    assert nice_values(4, outer=8) == {"main": 8, "older": 8, "newer": 8, "child": 8}


def test_nice_of_zero_changes_nothing() -> None:
    assert nice_values(0) == {"main": 0, "older": 0, "newer": 0, "child": 0}


def test_compress_uses_nice_of_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nice_calls: list[int] = []
    monkeypatch.setattr(run_stages, "lower_priority", nice_calls.append)  # this process has other tests to run
    recipe = SimpleNamespace(compress=CompressConfig(steps=(), niceness=13), student=STUDENT, name="tiny")
    spec = DistillationSpec((), {}, (), 1.0)
    run = SimpleNamespace(recipe=recipe, context=tiny_context(tmp_path), distillation=spec)
    with pytest.raises(RunError, match="kdpipe train-student"):  # there is no student yet
        run_stages.run_compress(run)
    assert nice_calls == [13]
