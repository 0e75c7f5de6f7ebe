"""The acceptance of a GPU keeps to its eight minutes, keeps what it measured, and goes on after failures and cuts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_acceptance.py"

ROW = {"what": "speed", "measured": 1.0, "limit": "at least 1", "met": True}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose checks are lines of Python that find `rows`, the name of their file."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("KDPIPE_WORKSPACE")
    spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_acceptance", module)
    spec.loader.exec_module(module)
    return module


def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, code: dict[str, str], limit: float = 60
) -> None:
    """Run checks of these names."""
    checks = {name: script.Check("none", 50, f"advice on {name}") for name in code}
    monkeypatch.setattr(script, "CHECKS", checks)

    def command(name: str) -> list[str]:
        rows = out / "logs" / f"{name}.jsonl"
        return [sys.executable, "-Sc", f"rows = {str(rows)!r}\nrow = {json.dumps(ROW)!r}\n{code[name]}"]

    monkeypatch.setattr(script, "command_of", command)
    script.run_all(argparse.Namespace(out=out, limit=limit, only=None, again=[], toy=False))


GOOD = "open(rows, 'w').write(row + '\\n')"


def test_limits_sum_to_eight_minutes(script: ModuleType) -> None:
    """Those of checks that run side by side count once."""
    alone = sum(check.limit_s for check in script.CHECKS.values() if check.alone)
    together = max(check.limit_s for check in script.CHECKS.values() if not check.alone)
    assert alone + together == script.TOTAL_S == 480


def test_every_check_exists(script: ModuleType) -> None:
    for name, check in script.CHECKS.items():
        assert f"\ndef {name}(settings: Settings)" in (SCRIPT.parent / "gpu_checks" / f"{check.module}.py").read_text()


def test_runs_use_nothing_of_each_other(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else those that are compared would be one and the same."""
    run(script, monkeypatch, tmp_path, {"one": f"import os; os.environ['KDPIPE_WORKSPACE'] == 'none' and {GOOD}"})
    assert json.loads((tmp_path / "acceptance.json").read_text())["one"]["rows"] == [ROW]


def test_a_failure_leaves_the_others_and_its_rows(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = f"{GOOD[:-1]} + row[:9])\nprint('some words', flush=True)\nimport os; os.kill(os.getpid(), 11)"
    run(script, monkeypatch, tmp_path, {"one": crash, "two": "1 / 0", "three": GOOD})
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert list(found) == ["one", "two", "three"]
    assert [found[name]["rows"] for name in found] == [[ROW], [], [ROW]]
    assert found["one"]["error"] == "some words"
    assert found["two"]["error"].endswith("ZeroDivisionError: division by zero")
    assert "error" not in found["three"]
    table = (tmp_path / "acceptance.md").read_text()
    assert "| two | did not end | ZeroDivisionError: division by zero | | **no** |" in table
    assert "advice on two (`logs/two.txt`)" in table and "advice on three" not in table


def test_a_check_that_was_cut_off_is_run_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "MIN_LEFT_S", 0.2)
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(77)'], "
    sleep = f"{GOOD}; {child} start_new_session=True); time.sleep(77)"
    run(script, monkeypatch, tmp_path, {"one": GOOD, "two": sleep}, limit=1)
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert found["two"]["rows"] == [ROW] and found["two"]["cut_off"] == "ended after 1 s"
    assert not [one for one in psutil.process_iter(["cmdline"]) if "time.sleep(77)" in str(one.info["cmdline"])]
    run(script, monkeypatch, tmp_path, {"one": "1 / 0", "two": GOOD})
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert all(script.passed(one) for one in found.values())  # the first one was not run again
