"""Recipes for teachers of more classes than the data has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.kdpipe_process import kdpipe_here

from kdpipe.pipeline.recipe import dry_build
from kdpipe.pipeline.recipe.load import load_recipe
from kdpipe.stages.models.build import ModelConfig, build_model

PHOTOS = ["recipe", "new", "r.toml", "--yes", "--data", "imagefolder:photos", "--root", ".", "--image-size", "16"]
OWN = ["--teacher", "mlp", "--teacher-weights", "seven.safetensors", "--normalization", "imagenet"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos of a church, a tench and a truck, and the weights of a network of seven classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_build, "dry_build", lambda recipe: ([], []))
    for name in ("church", "tench", "garbage truck"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        (tmp_path / "photos" / "val" / name).mkdir(parents=True)
    mlp = build_model(ModelConfig(name="mlp"), num_classes=7, in_channels=3, image_size=(16, 16), seed=0)
    save_file({f"module.{name}": tensor for name, tensor in mlp.state_dict().items()}, "seven.safetensors")
    Path("seven.txt").write_text("bee\ngarbage_truck\nchurch, church building\ncat\ndog\ntench\nelk\n")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "classes", "fresh_head", "is_trained"),
    [
        (["--teacher", "resnet18", "--teacher-weights", "published"], "published", False, False),
        (["--teacher", "resnet18", "--teacher-weights", "published", "--classes", "none"], None, True, True),
        (["--teacher", "timm:resnet18", "--teacher-weights", "published"], "published", False, False),
        ([*OWN, "--classes", "seven.txt"], "seven.txt", False, False),
        (OWN, None, True, True),
    ],
)
def test_new_takes_the_rows_of_the_data_where_they_are_known(options, classes, fresh_head, is_trained):
    assert kdpipe_here(*PHOTOS, *options).exit_code == 0
    teacher = load_recipe(Path("r.toml")).teacher
    assert (teacher.model.classes, teacher.model.fresh_head) == (classes, fresh_head)
    assert (teacher.train is not None) == is_trained
    assert bool(teacher.mean) == ("--normalization" in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*OWN, "--classes", "published"], "--classes: model.classes = 'published' is for published weights"),
        ([*OWN, "--classes", "six.txt"], "--classes: 'six.txt' has 6 classes, and the weights 7."),
        ([*OWN, "--classes", "other.txt"], "--classes: classes: 1 of the data's 3 classes are not among the 7"),
        (["--teacher", "mlp", "--classes", "none"], "--classes does not apply"),
    ],
)
def test_new_refuses_lists_that_are_not_those_of_the_weights(options, message):
    names = Path("seven.txt").read_text()
    Path("six.txt").write_text(names.replace("bee\n", ""))
    Path("other.txt").write_text(names.replace("tench", "carp"))
    assert message in kdpipe_here(*PHOTOS, *options).stderr


@pytest.mark.parametrize("num_classes", [3, 7])
def test_classes_are_asked_for_only_where_the_weights_have_more(num_classes):
    weights = build_model(ModelConfig(name="mlp"), num_classes=num_classes, in_channels=3, image_size=(16, 16), seed=0)
    torch.save(weights.state_dict(), file := f"{num_classes}.pt")
    own = [file if one.startswith("seven") else one for one in OWN]
    assert kdpipe_here(*PHOTOS, *own).exit_code == 0
    assert ("fresh_head = true" in Path("r.toml").read_text()) == (num_classes == 7)
