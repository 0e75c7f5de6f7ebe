"""Images with several labels, or with numbers, through all stages of the command line and of the Python API."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here

import kdpipe as kd
from kdpipe import losses
from kdpipe.store import FingerprintMismatch

RECIPE = """
name = "TASK"
device = "DEVICE"
num_threads = 1
data = { name = "table:images.csv", task = "TASK", label_column = ["top", "left"], channels = 1, test_share = 0.25 }
views = { num_views = 2 }
distill = [{ loss = "LOSS" }]

[teacher]
model = { name = "cnn", args = { width = 8, num_stages = 2 } }
train = { epochs = 4, batch_size = 32, lr = 0.02 }

[student]
model = { name = "cnn", args = { width = 4, num_stages = 2 } }
train = { epochs = 2, batch_size = 32, lr = 0.02 }
seeds = [0]

[compress]
prune = { round_to = 1, ratio = 0.1 }
prune_train = { epochs = 1, batch_size = 32, lr = 0.01 }
quantize_train = { epochs = 1, batch_size = 32, lr = 0.001 }
baselines = false
latency_rounds = 3
""".replace("DEVICE", str(DEVICE))


def images_of(count):
    """Return images with a bright square, uint8 [N, 8, 8], and its position from -1 to 1, float32 [N, 2]."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 50, (count, 8, 8), dtype=np.uint8)
    corners = generator.integers(0, 6, (count, 2))
    for image, (top, left) in zip(pixels, corners, strict=True):
        image[top : top + 3, left : left + 3] = 220
    return pixels, (corners / 2.5 - 1).astype(np.float32)


@pytest.fixture(scope="module", params=["multilabel", "regression"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pixels, positions = images_of(240)
    targets = (positions > 0).astype(int) if request.param == "multilabel" else positions
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "top", "left"])
        for number, (image, (top, left)) in enumerate(zip(pixels, targets, strict=True)):
            Image.fromarray(image).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", "" if number % 10 == 0 else top, left])
    recipe = folder / "recipe.toml"
    loss = "binary_kd" if request.param == "multilabel" else "logit_mse"
    recipe.write_text(RECIPE.replace("TASK", request.param).replace("LOSS", loss))
    ended = kdpipe_here("run", recipe, "--run", folder / "run", "--set", f"data.root={json.dumps(str(folder))}")
    assert ended.exit_code == 0, ended.stderr
    return request.param, folder, ended


def test_every_network_is_judged_by_the_metric_of_its_task(run):
    task, folder, ended = run
    metric, title, least = ("mAP", "mean average precision", 0.7) if task == "multilabel" else ("r2", "R²", 0.3)
    for job in ("teacher", "students/distilled-seed0", "compressed/pruned-seed0", "compressed/int8-seed0"):
        result = json.loads((folder / "run" / job / "result.json").read_text())
        assert result["metric"] == metric and "accuracy" not in result
        assert (result["onnx_agreement"] or 1) >= 0.99
    teacher, page = (folder / "run" / name for name in ("teacher/result.json", "report.html"))
    found = json.loads(teacher.read_text())
    low, high = found["examined"]["interval"]
    assert low - 1e-9 <= found[metric] <= high + 1e-9 and found[metric] > least
    assert title in ended.stdout and title in page.read_text()
    assert ("Average precision of each label" in page.read_text()) == (task == "multilabel")


def test_a_store_says_what_its_outputs_are(run):
    task, folder, _ = run
    shown = kdpipe_here("store", "info", folder / "run/store.zarr").stdout
    assert ("sigmoid" if task == "multilabel" else "numbers (regression)") in shown
    assert kd.open_store(folder / "run/store.zarr").manifest.task == task


def test_a_handed_over_network_predicts_labels_or_numbers(run):
    import onnxruntime

    task, folder, _ = run
    network = next((folder / "run/compressed").glob("artifacts-seed0/*/model.onnx"))
    facts = onnxruntime.InferenceSession(network).get_modelmeta().custom_metadata_map
    assert json.loads(facts["task"]) == task and json.loads(facts["class_names"]) == ["top", "left"]
    card = (network.parent / "README.md").read_text()
    assert ("any of 2 labels: top, left" if task == "multilabel" else "2 numbers: top, left") in card


def test_what_is_for_classes_is_refused_by_name(run):
    task, folder, _ = run
    data = f"data.root={json.dumps(str(folder))}"
    for change, word in (
        ('distill=[{loss="kd"}]', f"distill.0 (kd) is for classification, and data.task is {task!r}"),
        ("cache.top_k=1", "cache.top_k is for classes"),
        ("student.label_smoothing=0.1", "label_smoothing is for classes"),
        ('data.label_column="nothing"', "nothing"),
    ):
        ended = kdpipe_here("run", folder / "recipe.toml", "--run", folder / "no", "--set", data, "--set", change)
        assert ended.exit_code != 0 and word in ended.stderr, ended.stderr


def test_python_equals_the_command_line(run):
    task, folder, _ = run
    columns = {"task": task, "label_column": ["top", "left"], "channels": 1, "test_share": 0.25}
    train, test = kd.load_dataset("table:images.csv", root=str(folder), **columns)
    loss = losses.BinaryKD() if task == "multilabel" else losses.LogitMSE()
    settings = {"epochs": 2, "batch_size": 32, "lr": 0.02, "model_args": {"width": 4, "num_stages": 2}}
    settings |= {"test": test, "losses": [loss], "num_workers": 0, "device": DEVICE}
    made = kd.train_student("cnn", train, folder / "run/store.zarr", run=folder / "python", **settings)
    wanted = json.loads((folder / "run/students/distilled-seed0/result.json").read_text())
    assert made.value == wanted[made.metric]
    changed = replace(train, targets=train.targets.roll(1, 0))
    with pytest.raises(FingerprintMismatch, match="label of sample"):
        kd.train_student("cnn", changed, folder / "run/store.zarr", run=folder / "other", **settings)


def test_a_torch_dataset_keeps_unknown_targets():
    pixels, positions = images_of(12)
    positions[3] = np.nan
    positions[4, 1] = np.nan
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(pixels)[:, None], torch.from_numpy(positions))
    found = kd.as_image_set(dataset, task="regression", class_names=["top", "left"])
    assert (found.num_classes, found.labels.tolist().count(-1), found.label_name(3)) == (2, 1, "unlabeled")
    assert torch.equal(found.targets.isnan(), torch.from_numpy(positions).isnan())
    with pytest.raises(kd.KdpipeError, match="multilabel"):
        kd.as_image_set(dataset)
