"""The examples, run as their users run them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.kdpipe_process import environment
from support.warm_process import WarmProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "own_loss"])
def test_script_runs_and_prints_an_accuracy(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "2", *(["--seeds", "1"] if name == "own_loss" else [])]
    process = WarmProcess([str(EXAMPLES / f"{name}.py"), *short], environment())
    out, errors = process.communicate(timeout=300)
    assert process.wait() == 0, errors
    assert "%" in out.splitlines()[-1]


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
