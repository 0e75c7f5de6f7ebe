"""The package's files agree with each other, and say what the installed package does."""

from __future__ import annotations

import io
import re
import tomllib

import yaml
from support.kdpipe_process import kdpipe_here
from support.paths import ROOT

from kdpipe.pipeline.terminal.output import console

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PROJECT["version"]


def test_python_versions_agree():
    declared = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    assert set(workflow["strategy"]["matrix"]["python"]) == declared
    assert PROJECT["requires-python"] == f">={min(declared)}"
    assert [step["run"] for step in workflow["steps"] if "run" in step] == [".ci/run"]


def test_license_and_type_marker_are_included():
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "kdpipe/py.typed").is_file()


def test_image_has_the_package_and_runs_the_demo():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["kdpipe"]\nCMD ["demo"]' in dockerfile
    assert dockerfile.index("USER 1000") < dockerfile.index("ENTRYPOINT")
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    linked = {path.resolve().name for path in (ROOT / "kdpipe").iterdir() if path.is_symlink()}
    assert allowed >= {"kdpipe", "recipes", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *linked}


def test_version_option_prints_the_version():
    assert re.fullmatch(r"kdpipe \S+( \(commit .*\))?\n", kdpipe_here("--version").stdout)


def test_no_color_turns_colors_off(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    colored = console(io.StringIO())
    colored.print("text", style="red")
    assert "\x1b[31m" in colored.file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    for arguments in (["losses"], ["losses", "kd"], ["--help"], ["run", "absent.toml"]):
        ended = kdpipe_here(*arguments)
        codes = re.findall(r"\x1b\[([\d;]*)m", ended.stdout + ended.stderr)
        assert {*";".join(codes).split(";")} <= {"", *"01234"}, codes  # bold, italic and underline are no colors
