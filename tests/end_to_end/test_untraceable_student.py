"""A student of the user's that torch.fx cannot trace: quantized by onnxruntime, and in FP16, by the command line."""

import json
import shutil
from importlib.util import find_spec

import onnx
import torch
from support.kdpipe_process import kdpipe_here
from support.made_store import folder_bytes

import kdpipe as kd

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("images must be a tensor")
        return self.fc(self.block(self.stem(x)).mean(dim=(2, 3)))

def net(num_classes, in_channels, image_size):
    return Net(num_classes)
"""

RECIPE = """
# Command: kdpipe run untraceable.toml. Hardware: any. Time: seconds. Expect: a done run.
name = "untraceable"
device = "cpu"
num_threads = 1
data = { name = "digits", num_train = 200 }
views = { num_views = 4, operations = [{ name = "RandomCrop", padding = 1 }] }
teacher = { model = { name = "cnn", args = { width = 4 } }, train = { epochs = 1, batch_size = 32 } }

[student]
model = { name = "python:untraceable_nets:net" }
train = { epochs = 2, batch_size = 32 }
baseline = false
seeds = [0]

[[distill]]
loss = "hint"
layers = [["block", "stage2"]]

[[distill]]
loss = "kd"

[compress]
steps = ["quantize"]
baselines = false
float16 = true
latency_rounds = 3
niceness = 0
"""


def test_student_is_calibrated_by_onnxruntime(tmp_path, monkeypatch):
    (tmp_path / "untraceable_nets.py").write_text(MODULE)
    (tmp_path / "untraceable.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    ended = kdpipe_here("run", "untraceable.toml", "--run", "run")
    assert ended.exit_code == 0, ended.stderr
    warned = "INT8, seed 0: torch.fx cannot trace its forward (Net): TypeError: images must be a tensor; calibrated by"
    assert ended.stderr.count(warned) == 1
    assert "INT8, calibrated by onnxruntime" in kdpipe_here("report", "run", "--no-html").stdout
    folder = tmp_path / "run" / "compressed" / "int8-seed0"
    result = json.loads((folder / "result.json").read_text())
    assert result["untraceable"].startswith("its forward (Net)")
    assert result["quantizer"] == "onnxruntime" and result["num_parameters"] > 1000 and result["num_macs"] > 1000
    assert 0.9 <= result["onnx_agreement"] <= 1 and result["max_logit_difference"] > 0  # against the float network

    artifacts = tmp_path / "run" / "compressed" / "artifacts-seed0"
    assert "calibrated by onnxruntime, without training" in (artifacts / "int8" / "README.md").read_text()
    assert not (artifacts / "int8" / "model.pt2").exists()
    network = kd.load_student(artifacts / "int8", trust_python=True)
    student = kd.load_student(artifacts / "student", trust_python=True)
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        logits, expected = (one.model(one.normalize(images)) for one in (network, student))
    assert logits.shape == expected.shape and 0 < float((logits - expected).abs().max()) < 0.5 * float(expected.std())
    operators = {node.op_type for node in onnx.load(artifacts / "int8" / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators

    files = [artifacts / "student" / name for name in ("model.onnx", "model_fp16.onnx")]
    bench = kdpipe_here("bench", *files, "--rounds", "3", "--json")
    assert bench.exit_code == 0, bench.stderr
    before = folder_bytes(folder)
    shutil.rmtree(folder)  # an equal run gives equal bytes
    again = kdpipe_here("compress", "untraceable.toml", "--run", "run", "--only", "quantize")
    assert again.exit_code == 0, again.stderr
    kept = ("model.onnx", "model.safetensors")
    after = folder_bytes(folder)
    assert {name: after[name] for name in after if name.endswith(kept)} == {
        name: before[name] for name in before if name.endswith(kept)
    }


def test_executorch_does_not_take_it(tmp_path, monkeypatch):
    (tmp_path / "untraceable_nets.py").write_text(MODULE)
    (tmp_path / "untraceable.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    ended = kdpipe_here("recipe", "check", "untraceable.toml", "--set", "compress.target=executorch")
    assert ended.exit_code == 2
    wanted = "needs a network that torch quantizes, not onnxruntime" if find_spec("executorch") else "executorch"
    assert wanted in " ".join(ended.stdout.split())
