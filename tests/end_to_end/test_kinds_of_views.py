"""A weak and a strong view of each image in one step, from the command line and in Python."""

import json

import pytest
from PIL import Image
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here

import kdpipe as kd

RECIPE = f"""
name = "kinds"
device = "{DEVICE}"
num_threads = 1
data = {{ name = "digits", num_train = 100 }}
cache = {{ batch_size = 50 }}

[views]
num_views = 2
kinds.weak = [{{ name = "RandomCrop", padding = 1 }}]
kinds.strong = [{{ name = "RandAugment", magnitude = 10 }}]

[teacher]
export = false
model = {{ name = "cnn", args = {{ width = 8 }} }}
train = {{ epochs = 1, batch_size = 50 }}

[student]
export = false
model = {{ name = "cnn", args = {{ width = 4 }} }}
train = {{ epochs = 1, batch_size = 50 }}
seeds = [0]
hard_label_views = ["weak"]

[[distill]]
loss = "mlld"
view = "weak"

[[distill]]
loss = "kd"
view = "strong"
target_view = "weak"

[[distill]]
loss = "kd"
target = "student"
target_view = "weak"
"""


def test_a_recipe_distills_in_two_kinds_of_views(tmp_path):
    recipe, run = tmp_path / "kinds.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    for command in ("train-teacher", "cache-teacher", "train-student"):
        ended = kdpipe_here(command, recipe, "--run", run)
        assert ended.exit_code == 0, ended.stderr
    ended = kdpipe_here("store", "info", run / "store.zarr")
    assert "4 (seed 0, weak: RandomCrop; strong: RandAugment)" in " ".join(ended.stdout.split())
    record = json.loads((run / "recipe.json").read_text())
    assert list(record["views"]["kinds"]) == ["weak", "strong"]
    losses = json.loads((run / "students" / "distilled-seed0" / "metrics.jsonl").read_text())["losses"]
    assert list(losses) == ["hard_labels", "mlld_0", "kd_1", "kd_2"]
    assert all(value > 0 for value in losses.values())
    ended = kdpipe_here("views", recipe, "--run", run, "--save", tmp_path / "grid.png", "--json")
    assert json.loads(ended.stdout)["views"] == [
        f"view {view}, {kind}" for view in (0, 1) for kind in ("weak", "strong")
    ]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 4 * 128
    ended = kdpipe_here("train-student", recipe, "--run", run, "--set", "views.kinds.strong=['RandomCrop']")
    assert ended.exit_code == 12
    assert "views.kinds.1" in ended.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.1.view=hard", "distill.1 (kd): view: views.kinds has no kind 'hard'; available: weak, strong."),
        ("student.hard_label_views=['weal']", "student.hard_label_views: views.kinds has no kind 'weal'; did you mean"),
        (
            "views.operations=['RandomCrop']",
            "views.kinds has the operations of each kind of view, and views.operations",
        ),
        ("views.kinds.strong=['Blur']", "views.kinds.strong.0: the tensor engine has no operation 'Blur'"),
        ("cohort.members=2", "a cohort's step shows one view of each image, and views.kinds has several kinds"),
    ],
)
def test_faults_are_found_before_anything_is_trained(tmp_path, override, message):
    recipe = tmp_path / "kinds.toml"
    recipe.write_text(RECIPE)
    ended = kdpipe_here("recipe", "check", recipe, "--set", override)
    assert ended.exit_code == 2
    assert message in " ".join((ended.stdout + ended.stderr).split())


def test_in_python(tmp_path):
    train, test = kd.load_dataset("digits", num_train=100)
    views = kd.Views(1, kinds={"weak": ["RandomCrop"], "strong": ["RandAugment"]})
    teacher = kd.create_model("cnn", train, width=4)
    store = kd.cache_teacher(teacher, train, tmp_path / "store", views=views, mean=[0.3], std=[0.4], progress=False)
    losses = [kd.losses.KD(view="strong"), kd.losses.LogitMSE(target="student", target_view="weak")]
    options = {"hard_label_views": ["weak"], "export": False}
    result = kd.train_student(
        "cnn",
        train,
        store,
        test=test,
        losses=losses,
        options=options,
        run=tmp_path / "run",
        model_args={"width": 4},
        epochs=1,
        progress=False,
    )
    assert result.accuracy > 0
    with pytest.raises(kd.KdpipeError, match="there are no kinds: set views.kinds"):
        kd.train_student("cnn", train, test=test, options=options, run=tmp_path / "alone", epochs=1, progress=False)
