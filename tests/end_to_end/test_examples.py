"""The examples, run as their users run them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "own_loss"])
def test_script_runs_and_prints_an_accuracy(name, tmp_path):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate")
    short = ["--epochs", "2", *(["--seeds", "2"] if name == "own_loss" else [])]
    ended = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *short],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "%" in ended.stdout.splitlines()[-1]


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 30", "EPOCHS = 2")
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not any(output.output_type == "error" for output in outputs)
    assert (tmp_path / "student.onnx").exists()
