"""Teachers without a classifier: from the command line to the quantized student, and in Python."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here
from support.made_store import make_store

import kdpipe as kd
from kdpipe import KdpipeError
from kdpipe.stages.errors import RecipeError

RECIPE = f"""
name = "embeddings"
device = "{DEVICE}"
num_threads = 1
data = {{ name = "digits", num_train = 200, channels = 3 }}
views = {{ num_views = 2, operations = [{{ name = "RandomCrop", padding = 1 }}] }}
distill = [{{ loss = "cosine" }}, {{ loss = "rkd" }}]

[teacher]
output = "embeddings"
model = {{ name = "timm:test_vit", args = {{ patch_size = 2 }}, weights = "WEIGHTS" }}

[student]
model = {{ name = "cnn", args = {{ width = 4 }} }}
train = {{ epochs = 2, batch_size = 50 }}
seeds = [0]
hard_label_weight = 0.0
baseline = false

[compress]
baselines = false
niceness = 0
prune = {{ ratio = 0.25, round_to = 1 }}
prune_train = {{ epochs = 1, batch_size = 50 }}
quantize_train = {{ epochs = 1, batch_size = 50 }}
"""


def test_a_vit_without_a_classifier_teaches_a_cnn(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", img_size=8, patch_size=2, num_classes=7).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    recipe, run = tmp_path / "embeddings.toml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("WEIGHTS", str(tmp_path / "vit.safetensors")))
    ended = kdpipe_here("run", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    info = json.loads(kdpipe_here("store", "info", run / "store.zarr", "--json").stdout)
    assert [(name, spec["row_shape"]) for name, spec in info["arrays"].items()] == [("features/pre_logits", [64])]
    jobs = ("teacher", "students/distilled-seed0", "compressed/pruned-seed0", "compressed/int8-seed0")
    for job in jobs:
        result = json.loads((run / job / "result.json").read_text())
        assert result["knn"]["num_images"] == 200
        assert result["accuracy"] == pytest.approx(result["linear_probe"]["accuracy"], abs=0.03)
    student = json.loads((run / jobs[1] / "result.json").read_text())
    assert student["accuracy"] > 0.3  # no loss trains its classifier: it is the probe
    ended = kdpipe_here("recipe", "check", recipe, "--set", "distill.1.loss=kd")
    assert ended.exit_code == 2
    assert "distill.1 (kd) needs the teacher's logits" in ended.stdout


@pytest.mark.filterwarnings("error::UserWarning", "ignore:Attempting to run cuBLAS")  # torch's own, once
def test_embeddings_in_python(tmp_path, without_onnx):
    train, test = kd.load_dataset("digits", test_share=0.8)
    teacher = kd.create_model("resnet8", train, output="embeddings")
    settings = {"mean": [0.3], "std": [0.4], "progress": False, "device": DEVICE}
    store = kd.cache_teacher(teacher, train, tmp_path / "store.zarr", test=test, output="embeddings", **settings)
    assert store.layers == ("pre_logits",)
    assert kd.evaluate_embeddings(store)["linear_probe"]["accuracy"] > 0.8
    with pytest.raises(KdpipeError, match="has no embeddings"):
        kd.evaluate_embeddings(make_store(tmp_path / "made.zarr", num_samples=20).path, store)
    batch = next(iter(kd.DistillationLoader(store, train, batch_size=50)))
    assert batch.features["pre_logits"].shape == (50, 64)
    assert "teacher_logits" not in batch
    common = {"test": test, "epochs": 1, "progress": False, "seed": 1, "device": DEVICE}
    run = tmp_path / "run"
    student = kd.train_student("resnet8", train, store, losses="cosine", hard_label_weight=0.0, run=run, **common)
    assert (store.path.parent / "store.test.zarr").exists()
    assert student.figures["linear_probe"]["accuracy"] == pytest.approx(student.accuracy, abs=1e-6)
    with pytest.raises(RecipeError, match="needs the teacher's logits"):
        kd.train_student("resnet8", train, store, losses="kd", run=tmp_path / "other", **common)
