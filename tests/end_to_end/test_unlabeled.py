"""A teacher and a folder of photographs without a single label, through all stages of the command line."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here

from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.training.saved_model import save_model

RECIPE = """
name = "photographs"
device = "DEVICE"
num_threads = 1
data = { name = "imagefolder:photos", labels = "none", channels = 1, classes = ["a", "b", "c"], validation_share = 0.2 }
views = { num_views = 2, operations = [{ name = "RandomCrop", padding = 1 }], mix = { mixup_alpha = 0.2 } }
distill = [{ loss = "kd" }]

[teacher]
mean = [0.3]
std = [0.4]
model = { name = "cnn", args = { width = 8, num_stages = 2 }, weights = "WEIGHTS" }

[student]
model = { name = "cnn", args = { width = 4, num_stages = 2 } }
train = { epochs = 2, batch_size = 32, lr = 0.05 }
seeds = [0]

[compress]
steps = ["prune"]
prune = { round_to = 1 }
prune_train = { epochs = 1, batch_size = 32, lr = 0.01 }
latency_rounds = 3
""".replace("DEVICE", str(DEVICE))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabeled")
    for number, image in enumerate(load_digits().images[:200]):
        split = folder / "photos" / ("train" if number < 140 else "test")
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(split / f"{number}.png")
    model = ModelConfig(name="cnn", args={"width": 8, "num_stages": 2})
    teacher = build_model(model, num_classes=3, in_channels=1, image_size=(8, 8), seed=0)
    save_model(folder / "teacher.safetensors", teacher, {})
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.replace("WEIGHTS", str(folder / "teacher.safetensors")))
    ended = kdpipe_here("run", recipe, "--run", folder / "run", "--set", f"data.root={json.dumps(str(folder))}")
    assert ended.exit_code == 0, ended.stderr
    return folder / "run", ended


def test_networks_are_judged_by_agreement_with_the_teacher(run):
    for job in ("students/distilled-seed0", "compressed/pruned-seed0"):
        result = json.loads((run[0] / job / "result.json").read_text())
        lines = [json.loads(line) for line in (run[0] / job / "metrics.jsonl").read_text().splitlines()]
        assert 0 < result["agreement"] <= 1 and result["metric"] == result["validation"]["metric"] == "agreement"
        assert result["best_agreement"] == max(line["agreement"] for line in lines)
        assert {line["split"] for line in lines} == {"validation"} and lines[-1]["losses"]["hard_labels"] == 0
    card = json.loads((run[0] / "compressed" / "artifacts-seed0" / "card.json").read_text())
    assert card["networks"]["student"].keys() >= {"agreement_interval", "validation_agreement"}


def test_there_is_no_student_alone_and_that_is_said(run):
    assert not (run[0] / "students" / "alone-seed0").exists()
    assert "no student is trained alone, as there are no labels" in run[1].stderr
    assert "test agreement with the teacher %" in run[1].stdout and "accuracy" not in run[1].stdout


def test_the_page_says_what_needs_labels(run):
    page = (run[0] / "report.html").read_text()
    assert "test agreement with the teacher" in page and "It needs the classes of test images, and none has one" in page
