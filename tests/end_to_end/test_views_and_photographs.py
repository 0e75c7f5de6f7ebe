"""Photos of different sizes, decoded by workers and mixed, from `kdpipe run` to `kdpipe views`."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here, signal_when, start
from support.made_store import folder_bytes

from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.store import open_store

FACTORY = """
from torch import nn


def net(width, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
"""

RECIPE = """
# Command: kdpipe train-teacher photographs.toml, and so on. Hardware: any. Time: seconds. Expect: done runs.
name = "photographs"
device = "DEVICE"
num_threads = 1
data = { name = "imagefolder:FOLDER", cache_bytes = 0, num_workers = 0 }
cache = { batch_size = 20, shard_bytes = 4096 }

[views]
num_views = 12
engine = "transforms"
operations = [{ name = "RandomResizedCrop", size = 24 }, { name = "RandomHorizontalFlip" }]
mix = { mixup_alpha = 0.4, cutmix_alpha = 1.0, p = 0.8 }

[teacher]
export = false
model = { name = "python:small_nets:net", args = { width = 8 } }
train = { epochs = 2, batch_size = 16, checkpoint_every_s = 0 }

[student]
export = false
model = { name = "python:small_nets:net", args = { width = 4 } }
train = { epochs = 4, batch_size = 16, checkpoint_every_s = 0 }
seeds = [0]

[[distill]]
loss = "kd"
""".replace("DEVICE", str(DEVICE))

WORKERS = "--set=data.num_workers=2"
"""Workers of separate processes: results must not depend on them."""

CLASSES = ("cat", "cow", "dog")
NUM_TRAIN, NUM_TEST = 16, 4
"""Images per class."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos, a user-defined network, and the recipe."""
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder / "images")
    (folder / "small_nets.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield folder
    sys.modules.pop("small_nets", None)


def make_photographs(folder):
    """Write JPEGs of noise, brighter by class, each of another size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(30, 70, 2)
                noise = rng.integers(0, 120, (height, width, 3)) + 60 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / split / name / f"{number}.jpg")


def recipe_of(place, images="images"):
    path = place / f"{images}.toml"
    path.write_text(RECIPE.replace("FOLDER", str(place / images)))
    return path


@pytest.fixture(scope="module")
def done(place):
    """An uninterrupted run, and the output of its commands."""
    recipe, run = recipe_of(place), place / "undisturbed"
    results = {}
    for command in ("train-teacher", "cache-teacher", "train-student"):
        results[command] = kdpipe_here(command, recipe, "--run", run, "--json")
        assert results[command].exit_code == 0, results[command].stderr
    return run, results


def test_pipeline_runs_and_the_store_has_the_teacher_logits(place, done):
    run, results = done
    cached = json.loads(results["cache-teacher"].stdout)["store"]
    assert (cached["num_samples"], cached["num_views"], cached["num_units_missing"]) == (48, 12, 0)
    students = json.loads(results["train-student"].stdout)["students"]
    assert [len(students[kind]) for kind in ("alone", "distilled")] == [1, 1]
    assert "Beyer" not in results["train-student"].stderr, "no warning for twelve replayed views"
    options = ("--recompute", 48, "--recipe", recipe_of(place), "--run", run)
    verified = kdpipe_here("store", "verify", run / "store.zarr", *options)
    assert verified.exit_code == 0, verified.output
    assert "48 samples were recomputed" in verified.stdout


def test_views_are_drawn_with_the_stored_predictions(place, done):
    run, _ = done
    before = folder_bytes(run)
    drawn = kdpipe_here(
        "views", recipe_of(place), "--run", run, "--save", place / "views.png", "--samples", 4, "--json"
    )
    assert drawn.exit_code == 0, drawn.stderr
    assert Image.open(place / "views.png").size == (96 + 6 * 136, 24 + 4 * 184)
    store = open_store(run / "store.zarr")
    for sample in json.loads(drawn.stdout)["samples"]:
        for view, top in enumerate(sample["top"]):
            logits = store.gather("logits", view, np.array([sample["id"]]))[0].astype(np.float64)
            shares = np.exp(logits) / np.exp(logits).sum()
            assert dict(map(tuple, top)) == pytest.approx(dict(zip(CLASSES, shares, strict=True)), rel=1e-5)
    assert folder_bytes(run) == before


def test_student_resumes_identically_after_a_signal(place, done):
    run, recipe = place / "stopped", recipe_of(place)
    shutil.copytree(done[0], run, ignore=shutil.ignore_patterns("distilled-*"))
    checkpoint = run / "students" / "distilled-seed0" / "checkpoint.safetensors"
    process = start("train-student", recipe, "--run", run, WORKERS)
    signal_when(process, checkpoint.exists, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert checkpoint.exists()
    ended = kdpipe_here("train-student", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    resumed, expected = (folder / "students" / "distilled-seed0" / "model.safetensors" for folder in (run, done[0]))
    assert resumed.read_bytes() == expected.read_bytes()


def test_cache_teacher_resumes_to_the_same_bytes(place, done):
    run, recipe = place / "half", recipe_of(place)
    shutil.copytree(done[0] / "teacher", run / "teacher")
    markers = run / "store.zarr" / "markers"
    stopped = stopped_here(lambda: any(markers.rglob("*/0/0/0")), "cache-teacher", recipe, "--run", run)
    assert stopped.exit_code == 75, stopped.output
    ended = kdpipe_here("cache-teacher", recipe, "--run", run, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert 0 < json.loads(ended.stdout)["store"]["num_units_computed"] < 12
    assert folder_bytes(run / "store.zarr") == folder_bytes(done[0] / "store.zarr")


def stopped_here(ready, *arguments):
    """Run `kdpipe` in this process, and send it a SIGTERM when `ready`."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes too late must not end the tests
    ended = threading.Event()

    def stop():
        while not ended.is_set() and not ready():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return kdpipe_here(*arguments)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def test_student_of_one_class_gets_all_mixtures_and_a_warning(place, done):
    changes = {
        "data.classes": '["cat"]',
        "views.num_views": "1",
        "student.stores": f'["{done[0] / "store.zarr"}"]',
        "student.train.epochs": "1",
    }
    overrides = [f"--set={key}={value}" for key, value in changes.items()]
    ended = kdpipe_here("train-student", recipe_of(place), "--run", place / "cats", *overrides)
    assert ended.exit_code == 0, ended.stderr
    assert "kdpipe: warning: views.num_views = 1: the student sees the same view of each image" in ended.stderr
    assert "3.0 in 1,200" in ended.stderr
    raised = kdpipe_here("train-student", recipe_of(place), "--run", place / "cats", *overrides, "--set=views.seed=3")
    assert raised.exit_code == 12
    assert "views.seed: stored 0, wanted 3" in raised.stderr


def test_corrupt_image_stops_the_job_or_is_dropped(place):
    shutil.copytree(place / "images", place / "corrupt")
    broken = place / "corrupt" / "train" / "cow" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    recipe, run = recipe_of(place, "corrupt"), place / "dropped"
    stopped = kdpipe_here("train-teacher", recipe, "--run", run)
    assert stopped.exit_code == 1
    assert str(broken) in stopped.stderr
    assert str(sample_id("cow/7.jpg")) in stopped.stderr
    assert not (run / "teacher" / "result.json").exists()
    dropped = kdpipe_here("train-teacher", recipe, "--run", run, "--set=data.unreadable=drop", "--json")
    assert dropped.exit_code == 0, dropped.stderr
    warnings = [line["job"] for line in map(json.loads, dropped.stderr.splitlines()) if line["unit"] == "warning"]
    assert len(warnings) == 1
    assert f"sample {sample_id('cow/7.jpg')} is left out: {broken}" in warnings[0]
    job = json.loads((run / "teacher" / "job.json").read_text())
    assert (job["data"]["num_samples"], job["views"]["mix"]["num_partners"]) == (47, 47)
