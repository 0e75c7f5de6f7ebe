"""`kdpipe recipe new`, `check` and `schema`: what they print and write, and how they refuse."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.recipe import new as recipe_new
from pipeline.recipe.app import recipe_app
from pipeline.recipe.habits import HABITS
from pipeline.recipe.load import load_recipe
from pipeline.recipe.text import OFFERED_LOSSES, toml_value

RECIPES = Path(__file__).parents[2] / "recipes"

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
compress = { prune = { keep = ["nothing"] } }
distill = [
  { loss = "kd" },
  { loss = "rkd", layers = [["layer3", "layer3"]], samples = { weigh = "entropy" } },
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


def test_check_calls_recipes_fine_and_says_what_they_would_do():
    shown = called("check", RECIPES / "digits.toml", RECIPES / "compress.toml").stdout.splitlines()
    assert len(shown) == 2
    assert "digits.toml: fine: digits; teacher cnn, trained for 40 epochs; 20 views; student cnn" in shown[0]
    assert "kd + hint, 5 seeds; prune and quantize" in shown[0]


def test_check_lists_every_fault_of_every_file_and_exits_with_2():
    shown = called("check", written(BAD), written('name = "x', "broken.toml"), "none.toml", code=2).stdout
    assert "r.toml: seed = -1: input should be greater than or equal to 0." in shown
    assert "r.toml: unknown key 'nmae'; did you mean 'name'?" in shown
    assert "r.toml: unknown key 'student.train.epoch'; did you mean 'epochs'?" in shown
    assert "broken.toml is not valid TOML" in shown
    assert "cannot read the recipe none.toml (No such file or directory): name another" in shown
    assert len(shown.splitlines()) == 5


def test_check_tries_networks_layers_and_losses_without_the_data():
    teacherless = called("check", written(UNFIT), code=2).stdout
    assert "teacher: resnet20 has no argument 'widht'" in teacherless
    assert "compress: the model has no module 'nothing'" in teacherless
    assert "distill.1 (rkd): samples.weigh = 'entropy' is for losses that are a mean" in teacherless
    assert "teacher.train.milestones do nothing with schedule = 'cosine'" in teacherless
    shown = called("check", "r.toml", "--set", "teacher.model.args={}", code=2).stdout
    assert "cache.layers.0: the model has no module 'layr3'; nearest: layer3" in shown
    assert "distill.2 (hint) names store 2; there are 1" in shown
    fixed = ["distill.2.store=0", "teacher.model.args={}"]
    shown = called("check", "r.toml", *(part for each in fixed for part in ("--set", each)), code=2).stdout
    assert "distill.2 (hint), the teacher: the model has no module 'layr3'" in shown


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["data.name=cifar"], "unknown data set data.name='cifar'. Did you mean CIFAR10 or CIFAR100?"),
        (["student.model.name=resnet18x"], "student: no model is called 'resnet18x'"),
        (["student.model.name=torchvision:resnet18"], "student: torchvision"),
        (["teacher.train={}", "student.model.weights=published"], "student: there are no published weights of cnn"),
        (["views.operations=[{ name = 'Cutout', size = 8 }]"], "could paint over all of an image of 8 x 8"),
        (["student.mean=[0.5]"], "student: a model's mean and std must be given together"),
        (["student.teachers.temperatures=[1.0, 2.0]"], "student.teachers.temperatures has 2 entries"),
        (["data.test_crop=0.5"], "data.test_crop is for imagefolder:PATH alone"),
        (["student.model.args.width=10000000000"], "args.width is more than 65,536"),
        (["distill=[]"], "there is no [[distill]]"),
        (["cache.store=s3://bucket/store"], "cache.store = 's3://bucket/store'"),
    ],
)
def test_check_finds_what_a_run_would_refuse(changes, wanted):
    overrides = [part for each in changes for part in ("--set", each)]
    shown = called("check", RECIPES / "digits.toml", *overrides, code=2).stdout
    if wanted == "student: torchvision":
        assert "student: " in shown and "channels" in shown
    else:
        assert wanted in shown


def test_check_says_what_is_not_here_and_what_it_cannot_know(here):
    written(UNFIT.replace('"CIFAR10"', '"npz:pictures.npz"').replace(", args = { widht = 2 }", ""))
    overrides = ["student.model.weights=none.pt", "distill=[{ loss = 'kd' }]"]
    shown = called("check", "r.toml", *(part for each in overrides for part in ("--set", each))).stdout
    assert "only names are checked" in shown
    assert "student.model.weights = 'none.pt' is not on this machine" in shown
    assert list(here.iterdir()) == [here / "r.toml"]


def test_check_in_one_json_document(monkeypatch):
    monkeypatch.setenv("KDPIPE_SEED", "x")
    document = json.loads(called("check", RECIPES / "digits.toml", written(BAD), "--json", code=2).stdout)
    first, second = document["recipes"]
    assert first["faults"] == ["KDPIPE_SEED: seed = x: input should be a valid integer."]
    assert [first["fine"], second["fine"]] == [False, False]
    assert len(second["faults"]) == 3


def test_schema_is_printed_as_json():
    assert json.loads(called("schema").stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_new_takes_defaults_and_writes_a_recipe_that_is_fine(here):
    shown = called("new", "mine.toml", "--yes").stdout
    assert "mine.toml: written" in shown
    text = Path("mine.toml").read_text()
    for word in ("Command:   kdpipe run mine.toml", "Hardware:", "Time:", "Expect:", "not measured yet"):
        assert word in text
    recipe = load_recipe(Path("mine.toml"))
    assert (recipe.name, recipe.data.name, recipe.student.seeds) == ("mine", "digits", (0, 1, 2))
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) > 15
    assert [line for line in keys if "  # " not in line] == []
    assert list(here.iterdir()) == [here / "mine.toml"]
    called("check", "mine.toml")


@pytest.mark.parametrize("data", [*sorted(HABITS.keys() - {"CIFAR10"}), "npz:my pictures"])
@pytest.mark.parametrize("losses", ["kd", "+".join(OFFERED_LOSSES)])
def test_new_makes_recipes_of_every_kind_of_data(data, losses, monkeypatch):
    if data == "imagefolder":  # large networks take seconds to build and nothing here is about them
        data, losses = 'imagefolder:my "photos" \\ ü', "kd"
        monkeypatch.setattr(recipe_new, "rehearse_recipe", lambda recipe: type("Fine", (), {"faults": ()}))
    layers = ["--layers", "stage2,stage2"] if data.startswith("npz") and losses != "kd" else []
    called("new", "r.toml", "--yes", "--data", data, "--loss", losses, *layers, "--seeds", "2")
    recipe = load_recipe(Path("r.toml"))
    assert recipe.data.name == data
    assert [loss.loss for loss in recipe.distill] == losses.split("+")
    assert recipe.student.seeds == (0, 1)


def test_new_takes_every_answer_as_an_option():
    options = {
        "name": "n-1",
        "data": "mnist",
        "root": 'a "b" \\ c',
        "teacher": "mlp",
        "teacher-weights": "../weights of mine.pt",
        "student": "mlp",
        "loss": "rkd",
        "layers": "layer1,layer1",
        "seeds": "1",
        "compress": "no",
    }
    called("new", *(part for key, text in options.items() for part in (f"--{key}", text)))
    recipe = load_recipe(Path("n-1.toml"))
    assert (recipe.data.name, recipe.data.root) == ("MNIST", 'a "b" \\ c')
    assert (recipe.teacher.model.weights, recipe.teacher.train) == ("../weights of mine.pt", None)
    assert recipe.distill[0].layers == (("layer1", "layer1"),)
    assert recipe.student.hard_label_weight == 1.0
    assert recipe.compress.steps == ()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], "give --yes"),
        (["--yes", "--name", "../x"], "--name: '../x' is no name of a run folder"),
        (["--yes", "--data", "cifar"], "--data: 'cifar' is no data set: known are digits"),
        (["--yes", "--data", "imagefolder:"], "is no data set"),
        (["--yes", "--data", "npz:a\x1bb"], "control character"),
        (["--yes", "--teacher", "resnet2O"], "--teacher: no model is called 'resnet2O'; nearest: "),
        (["--yes", "--teacher-weights", "published"], "there are no published weights of cnn"),
        (["--yes", "--loss", "magic"], "--loss: magic is not among the losses to begin with"),
        (["--yes", "--layers", "a,b"], "--layers is not asked for"),
        (["--yes", "--loss", "hint", "--layers", "stage2"], "is no pair of modules"),
        (["--yes", "--loss", "hint", "--layers", "stage2,stage9"], "do not go together"),
        (["--yes", "--seeds", "0"], "--seeds: '0' is no whole number from 1 to 100"),
        (["--yes", "--seeds", "²"], "is no whole number"),
        (["--yes", "--compress", "maybe"], "is neither yes nor no"),
        (["--yes", "--prune-ratio", "nan"], "is no share"),
        (["--yes", "--prune-ratio", "1"], "is no share"),
        (["--yes", "--student", "mobilenet_v2"], "do not go together"),
    ],
)
def test_new_refuses_in_a_sentence_and_writes_nothing(here, options, wanted):
    said = called("new", *options, code=2).stderr
    assert wanted in said
    assert len(said.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_new_never_writes_over_anything(here):
    written("mine", "there.toml")
    Path("dangling.toml").symlink_to("nowhere")
    for name in ("there.toml", "dangling.toml"):
        assert "is there already" in called("new", name, "--yes", code=2).stderr
    assert "there is no folder" in called("new", "no/such.toml", "--yes", code=2).stderr
    assert Path("there.toml").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["dangling.toml", "there.toml"]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(recipe_new, "is_terminal", lambda: True)


def test_new_asks_takes_enter_for_the_default_and_asks_again_after_a_slip(terminal):
    answers = ["", "Digits!", "digits", "cnnn", "cnn", "", "", "kd, magic", "kd hint", "", "99999", "2", "", "2", "0.5"]
    ended = called("new", "asked.toml", answers="\n".join(answers) + "\n")
    assert "Name of the experiment [asked]: " in ended.stdout
    assert "'Digits!' is no data set" in ended.stderr
    assert "no model is called 'cnnn'; nearest: cnn" in ended.stderr
    assert "magic is not among the losses" in ended.stderr
    assert "'99999' is no whole number" in ended.stderr
    assert "'2' is no share" in ended.stderr
    assert "[stage2,stage2]" in ended.stdout
    recipe = load_recipe(Path("asked.toml"))
    assert [loss.loss for loss in recipe.distill] == ["kd", "hint"]
    assert (recipe.student.seeds, recipe.compress.prune.ratio) == ((0, 1), 0.5)


def test_new_asks_only_for_what_no_option_answers(terminal):
    ended = called("new", "--name", "half", "--data", "CIFAR10", "--compress", "no", answers="\n" * 6)
    assert "Name of" not in ended.stdout
    assert "Share of" not in ended.stdout
    assert "Folder in which it lies [data]: " in ended.stdout
    assert "Teacher's network [resnet32x4]: " in ended.stdout
    assert load_recipe(Path("half.toml")).data.name == "CIFAR10"


def test_new_leaves_nothing_behind_where_people_break_off(here, terminal, monkeypatch):
    assert "there was no answer: nothing is written" in called("new", "a.toml", answers="x\n", code=1).stderr

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert "interrupted: nothing is written" in called("new", "a.toml", code=130).stderr
    assert list(here.iterdir()) == []


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_ends_as_a_toml_string(text):
    assert tomllib.loads(f"value = {toml_value(text)}") == {"value": text}
    assert "\n" not in toml_value(text)
