"""Output, files and refusals of `kdpipe recipe new`, `check` and `schema`."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.paths import PYTHONPATH, ROOT
from typer.testing import CliRunner

from kdpipe.pipeline.recipe import dry_build
from kdpipe.pipeline.recipe import new as recipe_new
from kdpipe.pipeline.recipe.load import load_recipe
from kdpipe.pipeline.recipe.template import DEFAULTS, OFFERED_LOSSES, toml_value
from kdpipe.pipeline.recipe_app import recipe_app
from kdpipe.stages.data.names import FILE_KINDS
from kdpipe.stages.data.sources.user_function import DATASETS
from kdpipe.stages.models.networks.mlp import mlp
from kdpipe.stages.models.user_models import MODELS

RECIPES = ROOT / "recipes"

BAD = """name = "bad"
seed = -1
nmae = 2
data = { name = "digits" }
teacher = { model = { name = "cnn" } }
student = { model = { name = "cnn" }, train = { epoch = 3 } }
"""

UNFIT = """name = "unfit"
data = { name = "CIFAR10" }
cache = { layers = ["layr3"] }
teacher = { model = { name = "resnet20", args = { widht = 2 } }, train = { milestones = [5] } }
student = { model = { name = "resnet8" } }
compress = { prune = { exclude = ["nothing"] } }
distill = [
  { loss = "kd" },
  { loss = "rkd", layers = [["layer3", "layer3"]], samples = { weighting = "entropy" } },
  { loss = "hint", layers = [["layer3", "layr3"]], store = 2 },
]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("KDPIPE_SEED", "KDPIPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def called(*arguments, code=0, answers=None):
    ended = CliRunner().invoke(recipe_app, [str(each) for each in arguments], input=answers, catch_exceptions=False)
    assert ended.exit_code == code, ended.output
    return ended


def written(text, name="r.toml"):
    Path(name).write_text(text)
    return name


def test_check_says_fine_of_valid_recipes():
    lines = called("check", RECIPES / "digits.toml", RECIPES / "compress.toml").stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(".toml: fine") for line in lines)


def test_check_lists_every_fault_of_every_file():
    shown = called("check", written(BAD), written('name = "x', "broken.toml"), "none.toml", code=2).stdout
    assert "r.toml: seed = -1: it must be at least 0." in shown
    assert "r.toml: unknown key 'nmae'; did you mean 'name'?" in shown
    assert "r.toml: unknown key 'student.train.epoch'; did you mean 'epochs'?" in shown
    assert "broken.toml is not valid TOML" in shown
    assert "cannot read the recipe none.toml (No such file or directory): check the path" in shown
    assert len(shown.splitlines()) == 5


def test_check_builds_networks_and_losses_without_data():
    teacherless = called("check", written(UNFIT), code=2).stdout
    assert "teacher: resnet20 has no argument 'widht'" in teacherless
    assert "compress: the model has no module 'nothing'" in teacherless
    assert "distill.1 (rkd): samples.weighting = 'entropy' needs a per-sample loss" in teacherless
    assert "teacher.train.milestones is without effect: schedule = 'cosine'" in teacherless
    shown = called("check", "r.toml", "--set", "teacher.model.args={}", code=2).stdout
    assert "cache.layers.0: the model has no module 'layr3'; did you mean 'layer3'" in shown
    assert "distill.2 (hint) uses store 2, but there are 1" in shown
    fixed = ["distill.2.store=0", "teacher.model.args={}"]
    shown = called("check", "r.toml", *(part for each in fixed for part in ("--set", each)), code=2).stdout
    assert "distill.2 (hint), the teacher: the model has no module 'layr3'" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.name=cifar"], "unknown data set data.name='cifar'; did you mean 'CIFAR10' or 'CIFAR100'?"),
        (["student.model.name=resnet18x"], "student: no model is called 'resnet18x'"),
        (["student.model.name=torchvision:resnet18"], "student: torchvision"),
        (["teacher.train={}", "student.model.weights=published"], "student: there are no published weights of cnn"),
        (["student.train.optimizer=sdg"], "student.train.optimizer: there is no optimizer 'sdg'; did you mean 'sgd'"),
        (["student.train.schedule=python:absent:f"], "student.train.schedule='python:absent:f': the module absent"),
        (["student.train.min_lr=1.0"], "min_lr = 1 is above lr = 0.05"),
        (["views.operations=[{ name = 'Cutout', size = 8 }]"], "could cover all of an image of 8 x 8"),
        (["student.mean=[0.5]"], "student: a model's mean and std must be given together"),
        (["student.teachers.temperatures=[1.0, 2.0]"], "student.teachers.temperatures has 2 entries"),
        (["data.test_crop=0.5"], "data.test_crop applies only to imagefolder, table"),
        (["student.model.args.width=10000000000"], "args.width is more than 65,536"),
        (["distill=[]"], "there is neither [[distill]] nor"),
        (["cache.store=s3://bucket/store"], "cache.store = 's3://bucket/store'"),
    ],
)
def test_check_finds_what_a_run_would_refuse(changes, expected):
    overrides = [part for each in changes for part in ("--set", each)]
    shown = called("check", RECIPES / "digits.toml", *overrides, code=2).stdout
    if expected == "student: torchvision":
        assert "student: " in shown and "channels" in shown
    else:
        assert expected in shown


NETS = """
from torch import nn
def random(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def trained(num_classes):
    model = random(num_classes)
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    return model
def soft(num_classes): return nn.Sequential(nn.AvgPool2d(64), nn.Flatten(), nn.LazyLinear(num_classes), nn.Softmax(1))
"""


def test_check_refuses_a_softmax_whatever_the_size(here):
    (here / "checked_nets.py").write_text(NETS)
    sets = ["--set", "data.name=npz:absent", "--set", "student.model={ name = 'python:checked_nets:soft' }"]
    shown = called("check", RECIPES / "digits.toml", *sets, code=2).stdout
    assert "student: python:checked_nets:soft ends in a softmax: its outputs are probabilities" in shown


def test_check_wants_weights_of_an_untrained_teacher(here):
    (here / "checked_nets.py").write_text(NETS)
    written("name = 'r'\nteacher.model.name = 'x'\nstudent.model.name = 'cnn'\ndistill = [{ loss = 'kd' }]\n")
    shown = called("check", "r.toml", "--set", "teacher.model.name=python:checked_nets:random", code=2).stdout
    assert "the teacher python:checked_nets:random has random weights" in shown
    sets = ["--set", "teacher.model.name=python:checked_nets:trained", "--set", "teacher.mean=[0.3]"]
    assert "r.toml: fine" in called("check", "r.toml", *sets, "--set", "teacher.std=[0.2]").stdout
    shown = called("check", "r.toml", "--set", "teacher.model.name=cnn", code=2).stdout
    assert "the teacher has neither [teacher.train] nor teacher.model.weights" in shown


def test_check_knows_registered_names(here, monkeypatch):
    monkeypatch.setattr(DATASETS, "_registered", {"my_data": called})
    monkeypatch.setattr(MODELS, "_registered", {"my_net": mlp})
    overrides = ["data.name=my_data", "student.model={ name = 'my_net' }", "distill=[{ loss = 'kd' }]"]
    shown = called("check", RECIPES / "digits.toml", *(part for each in overrides for part in ("--set", each))).stdout
    assert "the size of the images is unknown until my_data is read" in shown


def test_check_notes_absent_files_and_unknown_sizes(here):
    written(UNFIT.replace('"CIFAR10"', '"npz:images.npz"').replace(", args = { widht = 2 }", ""))
    overrides = ["student.model.weights=none.pt", "distill=[{ loss = 'kd' }]"]
    shown = called("check", "r.toml", *(part for each in overrides for part in ("--set", each))).stdout
    assert "only names are checked" in shown
    assert f"the data is not checked: {here / 'data' / 'images.npz'} is not on this machine" in shown.replace("\n", "")
    assert "student.model.weights = 'none.pt' does not exist on this machine" in shown
    assert list(here.iterdir()) == [here / "r.toml"]


def test_check_wants_the_scaling_of_given_weights(here):
    changes = ["data.name=npz:images", "teacher={ model = { name = 'cnn', weights = 't.safetensors' } }"]
    sets = [part for each in changes for part in ("--set", each)]
    shown = called("check", RECIPES / "digits.toml", *sets).stdout
    assert "the teacher's input scaling is not checked: t.safetensors is not on this machine" in shown
    save_file({"bias": torch.zeros(1)}, "t.safetensors")
    shown = called("check", RECIPES / "digits.toml", *sets, code=2).stdout
    assert "the input scaling of the weights t.safetensors is not known" in shown
    Path("config.json").write_text('{"mean": 0.5, "std": 0.5}')
    called("check", RECIPES / "digits.toml", *sets)


def test_check_prints_one_json_document(monkeypatch):
    monkeypatch.setenv("KDPIPE_SEED", "x")
    document = json.loads(called("check", RECIPES / "digits.toml", written(BAD), "--json", code=2).stdout)
    first, second = document["recipes"]
    assert first["faults"] == ["KDPIPE_SEED: seed = x: it must be a whole number."]
    assert [first["fine"], second["fine"]] == [False, False]
    assert len(second["faults"]) == 3


def test_schema_is_printed_as_json():
    assert json.loads(called("schema").stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_new_writes_a_valid_recipe_from_defaults(here):
    shown = called("new", "blank.toml", "--yes").stdout
    assert [line.split("#")[0].strip() for line in shown.splitlines()] == [
        "wrote blank.toml; next:",
        "kdpipe recipe check blank.toml",
        "kdpipe plan         blank.toml",
        "kdpipe views        blank.toml",
        "kdpipe run          blank.toml",
    ]
    text = Path("blank.toml").read_text()
    for word in ("Command:   kdpipe run blank.toml", "Hardware:", "Time:", "Expect:", "not measured yet"):
        assert word in text
    recipe = load_recipe(Path("blank.toml"))
    assert (recipe.name, recipe.data.name, recipe.student.seeds) == ("blank", "digits", (0, 1, 2))
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) > 15
    assert [line for line in keys if "  # " not in line] == []
    assert list(here.iterdir()) == [here / "blank.toml"]
    called("check", "blank.toml")


@pytest.mark.parametrize("data", [*sorted(DEFAULTS.keys() - {"CIFAR10", *FILE_KINDS}), "imagefolder", "npz:my images"])
@pytest.mark.parametrize("losses", ["kd", "+".join(OFFERED_LOSSES)])
def test_new_writes_recipes_for_every_kind_of_data(data, losses, monkeypatch):
    if data == "imagefolder":  # skip building large networks, which takes seconds
        data, losses = 'imagefolder:my "photos" \\ ü', "kd"
        monkeypatch.setattr(dry_build, "dry_build", lambda recipe: ([], []))
    if ":" in data:
        Path("data", data.partition(":")[2]).mkdir(parents=True)
    layers = ["--layers", "stage2,stage2"] if data.startswith("npz") and losses != "kd" else []
    called("new", "r.toml", "--yes", "--data", data, "--loss", losses, *layers, "--seeds", "2")
    recipe = load_recipe(Path("r.toml"))
    assert recipe.data.name == data
    assert [loss.loss for loss in recipe.distill] == losses.split("+")
    assert recipe.student.seeds == (0, 1)


def test_new_takes_every_answer_as_an_option(here):
    save_file({"bias": torch.zeros(1)}, here / "my weights.pt")
    options = {
        "name": "n-1",
        "data": "mnist",
        "root": 'a "b" \\ c',
        "teacher": "mlp",
        "teacher-weights": "my weights.pt",
        "normalization": "0.1/0.4",
        "student": "mlp",
        "loss": "rkd",
        "layers": "layer1,layer1",
        "seeds": "1",
        "compress": "no",
    }
    called("new", *(part for key, text in options.items() for part in (f"--{key}", text)))
    recipe = load_recipe(Path("n-1.toml"))
    assert (recipe.data.name, recipe.data.root) == ("MNIST", 'a "b" \\ c')
    assert (recipe.teacher.model.weights, recipe.teacher.train) == ("my weights.pt", None)
    assert (recipe.teacher.mean, recipe.teacher.std) == ((0.1,), (0.4,))
    assert recipe.distill[0].layers == (("layer1", "layer1"),)
    assert recipe.student.hard_label_weight == 1.0
    assert recipe.compress.steps == ()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "pass --yes"),
        (["--yes", "--name", "../x"], "--name: invalid value '../x': it does not match the pattern"),
        (["--yes", "--data", "cifar"], "--data: unknown data set 'cifar'; choose from digits"),
        (["--yes", "--data", "imagefolder:"], "unknown data set"),
        (["--yes", "--data", "npz:a\x1bb"], "control character"),
        (["--yes", "--teacher", "resnet2O"], "--teacher: unknown model 'resnet2O'; did you mean "),
        (["--yes", "--teacher-weights", "published"], "there are no published weights of cnn"),
        (["--yes", "--loss", "magic"], "--loss: choose losses from kd, dkd, dist, nkd, hint, at, rkd, not magic"),
        (["--yes", "--layers", "a,b"], "--layers does not apply"),
        (["--yes", "--loss", "hint", "--layers", "stage2"], "is not a pair of modules"),
        (["--yes", "--loss", "hint", "--layers", "stage2,stage9"], "the teacher has no module 'stage9'; it has stage1"),
        (["--yes", "--data", "imagefolder:absent"], "--root: there is no "),
        (["--yes", "--data", "npz:absent.npz"], "name the folder that holds absent.npz"),
        (["--yes", "--data", "python:absent_module:load"], "--data: data.name='python:absent_module:load'"),
        (["--yes", "--teacher", "python:absent_module:net"], "--teacher: model.name='python:absent_module:net'"),
        (["--yes", "--teacher-weights", "absent.pt"], "--teacher-weights: there is no file "),
        (["--yes", "--normalization", "imagenet"], "--normalization does not apply"),
        (["--yes", "--seeds", "0"], "--seeds: invalid value '0': it must be at least 1"),
        (["--yes", "--seeds", "²"], "it must be a whole number"),
        (["--yes", "--compress", "maybe"], "it must be true or false"),
        (["--yes", "--prune-ratio", "nan"], "it must be a finite number"),
        (["--yes", "--prune-ratio", "1"], "it must be less than 1"),
        (["--yes", "--student", "mobilenet_v2"], "do not fit together"),
    ],
)
def test_new_refuses_invalid_answers_and_writes_nothing(here, options, expected):
    message = called("new", *options, code=2).stderr
    assert expected in message
    assert len(message.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_new_never_overwrites(here):
    written("kept", "there.toml")
    Path("dangling.toml").symlink_to("nowhere")
    for name in ("there.toml", "dangling.toml"):
        assert "already exists" in called("new", name, "--yes", code=2).stderr
    assert "the folder no does not exist" in called("new", "no/such.toml", "--yes", code=2).stderr
    assert Path("there.toml").read_text() == "kept"
    assert sorted(path.name for path in here.iterdir()) == ["dangling.toml", "there.toml"]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(recipe_new, "is_terminal", lambda: True)


def test_new_asks_again_after_an_invalid_answer(terminal):
    answers = ["", "Digits!", "digits", "cnnn", "cnn", "", "", "kd, magic", "kd hint", "", "99999", "2", "", "2", "0.5"]
    ended = called("new", "asked.toml", answers="\n".join(answers) + "\n")
    assert "Name of the experiment [asked]: " in ended.stdout
    assert "unknown data set 'Digits!'" in ended.stderr
    assert "unknown model 'cnnn'; did you mean 'cnn'" in ended.stderr
    assert "not magic; others: later" in ended.stderr
    assert "invalid value '99999'" in ended.stderr
    assert "invalid value '2': it must be less than 1" in ended.stderr
    assert "modules of the teacher: stage1 (" in ended.stdout
    assert "[stage2,stage2]" in ended.stdout
    recipe = load_recipe(Path("asked.toml"))
    assert [loss.loss for loss in recipe.distill] == ["kd", "hint"]
    assert (recipe.student.seeds, recipe.compress.prune.ratio) == ((0, 1), 0.5)


def test_new_asks_only_for_what_options_leave_open(terminal):
    ended = called("new", "--name", "half", "--data", "CIFAR10", "--compress", "no", answers="\n" * 6)
    assert "Name of" not in ended.stdout
    assert "Fraction of" not in ended.stdout
    assert "Folder of the data [data]: " in ended.stdout
    assert "Network of the teacher [resnet32x4]: " in ended.stdout
    assert load_recipe(Path("half.toml")).data.name == "CIFAR10"


def test_new_writes_nothing_when_interrupted(here, terminal, monkeypatch):
    assert "interrupted; nothing was written" in called("new", "a.toml", answers="x\n", code=1).stderr

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert "interrupted; nothing was written" in called("new", "a.toml", code=130).stderr
    assert list(here.iterdir()) == []


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips_as_a_toml_string(text):
    assert tomllib.loads(f"value = {toml_value(text)}") == {"value": text}
    assert "\n" not in toml_value(text)


@pytest.mark.parametrize(
    ("answer", "mean", "std"), [("mnist", 0.1307, 0.3081), ("0.5/0.25", 0.5, 0.25), ("mean", None, None)]
)
def test_new_asks_for_the_scaling_of_given_weights(here, answer, mean, std):
    save_file({"bias": torch.zeros(1)}, "t.safetensors")
    options = ["new", "r.toml", "--yes", "--teacher-weights", "t.safetensors"]
    assert "--normalization has no default here" in called(*options, code=2).stderr
    if mean is None:
        assert "'mean' is none of mnist, and not MEAN/STD" in called(*options, "--normalization", answer, code=2).stderr
        Path("config.json").write_text('{"mean": 0.5, "std": 0.5}')
        called(*options)
        assert load_recipe(Path("r.toml")).teacher.mean is None
        return
    called(*options, "--normalization", answer)
    assert (load_recipe(Path("r.toml")).teacher.mean, load_recipe(Path("r.toml")).teacher.std) == ((mean,), (std,))


FIRST_QUESTION = """
import sys
from kdpipe.pipeline.recipe import new
def asked(question):
    print(question, [name for name in ("torch", "torchvision", "numpy", "rich") if name in sys.modules])
    raise EOFError
new.is_terminal = lambda: True
new.input = asked
try:
    new.new_recipe(None, {"name": NAME}, yes=False)
except EOFError:
    pass
"""


@pytest.mark.parametrize(("name", "question"), [("None", "Name of the experiment [first]:"), ("'x'", "Data set (")])
def test_new_asks_its_first_questions_without_torch(name, question):
    code = FIRST_QUESTION.replace("NAME", name)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith(question), ended.stderr
    assert ended.stdout.rstrip().endswith("[]")
