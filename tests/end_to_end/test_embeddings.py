"""Teachers without a classifier: from the command line to the quantized student, and in Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
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


def test_without_labels_the_student_returns_embeddings(tmp_path):
    timm, rows = pytest.importorskip("timm"), ["path,split,label"]
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", img_size=8, patch_size=2, num_classes=7).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    images, _ = kd.load_dataset("digits", num_train=200, channels=3)
    for number in range(200):
        image = Image.fromarray(images.read(number).transpose(1, 2, 0))
        image.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'train' if number < 120 else 'test'},")
    (tmp_path / "images.csv").write_text("\n".join(rows))
    recipe, run = tmp_path / "embeddings.toml", tmp_path / "run"
    data = f'name = "table:{tmp_path / "images.csv"}", labels = "none", validation_share = 0.2'
    text = RECIPE.replace("WEIGHTS", str(tmp_path / "vit.safetensors"))
    recipe.write_text(text.replace('name = "digits", num_train = 200, channels = 3', data))
    planned = kdpipe_here("plan", recipe, "--run", run)
    assert "classifier" not in planned.stdout, planned.stdout
    ended = kdpipe_here("run", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    assert "embeddings are not checked" in ended.stderr
    assert "start from random" not in ended.stderr  # the adapters fit the pruned and the quantized student
    for job in ("teacher", "students/distilled-seed0", "compressed/pruned-seed0", "compressed/int8-seed0"):
        result = json.loads((run / job / "result.json").read_text())
        assert result["metric"] == result["validation"]["metric"] == "mutual_knn"
        assert result["mutual_knn"] == 1.0 if job == "teacher" else 0.1 < result["mutual_knn"] < 0.9
    small = run / "compressed" / "artifacts-seed0" / "int8"
    command = [sys.executable, small / "predict.py", tmp_path / "0.png"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(shown.stdout.partition(": ")[2])) == 32
    assert "returns an embedding" in (small / "README.md").read_text()
    assert kd.load_student(small / "model.safetensors").is_headless
    ended = kdpipe_here("recipe", "check", recipe, "--set", "distill.1.loss=simkd")
    assert ended.exit_code == 2


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {**TINY, "patch_size": 4, "image_size": 8}


def tower_folder(kind: str, folder: Path) -> Path:
    """Save a tiny CLIP of both towers, or a SigLIP image tower, as the hub has them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "clip":
        texts = {**TINY, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.CLIPConfig(vision_config=IMAGES, text_config=texts, projection_dim=6)
        transformers.CLIPModel(config).save_pretrained(folder)
    else:
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGES)).save_pretrained(folder)
    scaling = {"image_mean": [0.3] * 3, "image_std": [0.4] * 3, "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))
    return folder


@pytest.mark.parametrize(("kind", "width"), [("clip", 6), ("siglip", 16)])
def test_an_image_tower_of_transformers_teaches_a_cnn(kind, width, tmp_path):
    folder, recipe, run = tower_folder(kind, tmp_path / kind), tmp_path / "tower.toml", tmp_path / "run"
    losses = '{ loss = "hint", layers = [["pre_logits", "pre_logits"]], weight = 1.0 }, { loss = "cosine" }'
    teacher = f'model = {{ name = "hf:{folder}", weights = "published" }}'
    text = RECIPE.replace('{ loss = "cosine" }', losses).replace("batch_size = 50", "batch_size = 50, lr = 0.01")
    recipe.write_text("\n".join(teacher if "timm" in line else line for line in text.splitlines()))
    for command in ("run",) if kind == "siglip" else ("train-teacher", "cache-teacher", "train-student"):
        share = "0" if kind == "siglip" else "0.2"
        ended = kdpipe_here(command, recipe, "--run", run, "--set", f"data.validation_share={share}")
        assert ended.exit_code == 0, ended.stderr
    info = json.loads(kdpipe_here("store", "info", run / "store.zarr", "--json").stdout)
    assert info["arrays"]["features/pre_logits"]["row_shape"] == [width]
    results = [json.loads(path.read_text()) for path in run.glob("**/result.json")]
    assert len(results) == (4 if kind == "siglip" else 2)  # of teacher, student, pruned and INT8
    assert all(result[judge]["accuracy"] > 0.2 for result in results for judge in ("knn", "linear_probe"))
    assert all("validation" not in result or result["validation"]["accuracy"] > 0.2 for result in results)
    assert all(("validation" in result) == (kind == "clip") for result in results)
    assert (run / "compressed" / "artifacts-seed0" / "int8" / "model.onnx").exists() == (kind == "siglip")


def test_class_embeddings_make_a_clip_tower_classify(tmp_path):
    folder, recipe, run = tower_folder("clip", tmp_path / "clip"), tmp_path / "zero_shot.toml", tmp_path / "run"
    train, _ = kd.load_dataset("digits", num_train=200, channels=3)
    tower = kd.create_model(f"hf:{folder}", train, weights="published", output="embeddings").eval()
    with torch.no_grad():
        vectors = F.normalize(tower((torch.as_tensor(train.images) / 255 - 0.3) / 0.4), dim=1)
    means = [vectors[torch.as_tensor(train.labels) == label].mean(0) for label in range(10)]
    names = json.dumps([str(digit) for digit in reversed(range(10))])
    save_file({"classes": torch.stack(means[::-1])}, tmp_path / "names.safetensors", {"names": names})
    text = RECIPE.replace('[{ loss = "cosine" }, { loss = "rkd" }]', '[{ loss = "kd" }]').replace(
        'output = "embeddings"', f'class_embeddings = "{tmp_path / "names.safetensors"}"\nlogit_scale = 2000.0'
    )
    teacher = f'model = {{ name = "hf:{folder}", weights = "published" }}'
    recipe.write_text("\n".join(teacher if "timm" in line else line for line in text.splitlines()))
    for command in ("train-teacher", "cache-teacher", "train-student"):
        ended = kdpipe_here(command, recipe, "--run", run, "--set", "student.train.epochs=12")
        assert ended.exit_code == 0, ended.stderr
    for job in ("teacher", "students/distilled-seed0"):
        assert json.loads((run / job / "result.json").read_text())["accuracy"] > 0.2


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
