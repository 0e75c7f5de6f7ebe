"""Tests of `kdpipe modules`."""

import json

from support.paths import ROOT
from typer.testing import CliRunner

from kdpipe.pipeline.main import app

DIGITS = str(ROOT / "recipes" / "digits.toml")


def test_modules_are_listed_with_their_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["modules", DIGITS, "--json"], catch_exceptions=False)
    document = json.loads(ended.stdout)
    shapes = {role: {one["path"]: one["shape"] for one in document[role]} for role in ("teacher", "student")}
    assert shapes["teacher"]["stage2"] == [64, 4, 4]
    assert shapes["student"]["stage2"] == [12, 4, 4]
    assert list(tmp_path.iterdir()) == []


def test_modules_are_printed_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    size = ["--set", "student.image_size=4"]
    ended = CliRunner().invoke(app, ["modules", DIGITS, *size], catch_exceptions=False)
    lines = ended.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split()[:2] == ["stage2", "Sequential"] and line.rstrip().endswith("12 x 2 x 2") for line in lines)
