"""The examples, run as their users run them."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from support.kdpipe_process import environment
from support.warm_process import WarmProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
LESS = {
    "EPOCHS = 30": "EPOCHS = 1",
    '"epochs": 5': '"epochs": 1',
    '"epochs": 3': '"epochs": 1',
    'load_dataset("digits"': 'load_dataset("digits", num_train=200',
}


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
def test_code_of_the_notebook_runs(tmp_path, monkeypatch):
    """Run its cells as a script, with few images and epochs; .ci/run executes it in Jupyter as it is."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    for long, short in LESS.items():
        assert long in code
        code = code.replace(long, short)
    Path("notebook.py").write_text(code)
    process = WarmProcess(["notebook.py"], {**environment(), "MPLBACKEND": "agg"})
    _, errors = process.communicate(timeout=300)
    assert process.wait() == 0, errors
    assert Path("student.onnx").exists()


def test_upsampled_network_is_timms_on_larger_images(monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    create = importlib.import_module("upsampled").create
    small = create(name="tf_efficientnet_lite0", size=64, num_classes=3, in_channels=3).eval()
    large = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    large.load_state_dict(small.state_dict())
    images = torch.rand(2, 3, 32, 32)
    enlarged = torch.nn.functional.interpolate(images, size=(64, 64), mode="bicubic", align_corners=False)
    assert torch.equal(small(images), large(enlarged))
