"""Tests of importing torch-pruning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdpipe.stages.compress.pruning.library import import_torch_pruning


def test_timm_is_not_imported_for_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "try:\n    import timm\nexcept ImportError:\n    timm = None\n"
    (tmp_path / "torch_pruning.py").write_text(text)
    (tmp_path / "timm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torch_pruning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    del sys.modules["torch_pruning"]  # the fake is removed again after the test

    assert import_torch_pruning().timm is None
    assert "timm" not in sys.modules
