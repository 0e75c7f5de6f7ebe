"""Environment variables and --set: their precedence, the origins in messages, and the origin of each value."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.pipeline.commands.plan import printing
from kdpipe.pipeline.commands.plan.printing import print_plan, settings_json
from kdpipe.pipeline.recipe.load import load_recipe, load_recipe_with_origins, recipe_json
from kdpipe.pipeline.recipe.overrides import RESERVED
from kdpipe.pipeline.recipe.template import toml_value
from kdpipe.stages.errors import RecipeError

TEXT = """name = "least"
seed = 3

[teacher]
model = { name = "cnn", args = { width = 8 } }
train = { epochs = 1 }

[student]
model = { name = "cnn" }
seeds = [
  4,
  5,
]
[[distill]]
loss = "kd"

# a comment
[[distill]]
loss = "hint"
layers = [["stage1", "stage1"]]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TEXT)
    return path


def message_for(path, environ, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, environ)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_set_overrides_environment_overrides_file(path):
    environ = {"KDPIPE_SEED": "5", "KDPIPE_VIEWS__SEED": "6", "PATH": "/bin"}
    recipe = load_recipe(path, ["views.seed=7"], environ)
    assert (recipe.seed, recipe.views.seed, recipe.views.num_views) == (5, 7, 4)


def test_environment_takes_the_values_of_set(path):
    environ = {
        "KDPIPE_STUDENT__TRAIN__LR": "0.25",
        "KDPIPE_student__Model__name": "mlp",
        "KDPIPE_DATA__DOWNLOAD": "false",
        "KDPIPE_DISTILL__1__WEIGHT": "2",
        "KDPIPE_STUDENT__SEEDS": "[1, 2]",
        "KDPIPE_CACHE__STORE": "my store",
        "KDPIPE_DATA__ROOT": '"false"',
    }
    recipe = load_recipe(path, (), environ)
    assert recipe.student.train.lr == 0.25
    assert recipe.student.model.name == "mlp"
    assert recipe.data.download is False
    assert [loss.weight for loss in recipe.distill] == [0.9, 2.0]
    assert recipe.student.seeds == (1, 2)
    assert recipe.cache.store == "my store"
    assert recipe.data.root == "false"


def test_sections_of_the_environment_apply_before_their_keys(path):
    environ = {"KDPIPE_STUDENT__TRAIN__LR": "0.5", "KDPIPE_STUDENT__TRAIN": "{ epochs = 3, lr = 0.1 }"}
    train = load_recipe(path, (), environ).student.train
    assert (train.epochs, train.lr) == (3, 0.5)


def test_reserved_and_empty_variables_are_not_keys(path):
    environ = {**dict.fromkeys(RESERVED, "/fast"), "KDPIPE_SEED": "", "KDPIPE_NONSENSE": " "}
    assert load_recipe(path, (), environ) == load_recipe(path)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("KDPIPE_STUDENT__TRAIN__RL", "1", "KDPIPE_STUDENT__TRAIN__RL: unknown key 'student.train.rl'; did you mean "
         "'lr'?"),
        ("KDPIPE_STUDNET__TRAIN__LR", "1", "unknown key 'studnet'; did you mean 'student'?"),
        ("KDPIPE_DISTILL__0__WIEGHT", "1", "unknown key 'distill.0.wieght'; did you mean 'weight'?"),
        ("KDPIPE_STUDENT_TRAIN_LR", "1", "unknown key 'student_train_lr'; did you mean 'student'? In variables, `__`"),
        ("KDPIPE_ZZZ", "1", "KDPIPE_ZZZ: unknown key 'zzz'; known here: name, seed,"),
        ("KDPIPE_SEED", "-1", "KDPIPE_SEED: seed = -1: it must be at least 0"),
        ("KDPIPE_STUDENT__TRAIN__LR", "fast", "KDPIPE_STUDENT__TRAIN__LR: student.train.lr = fast: it must be a"),
        ("KDPIPE_SEED__X", "1", "KDPIPE_SEED__X: 'seed' is not a section"),
        ("KDPIPE_VIEWS__REPLAY__X", "1", "KDPIPE_VIEWS__REPLAY__X: views.replay"),
        ("KDPIPE_DISTILL__7__WEIGHT", "1", "KDPIPE_DISTILL__7__WEIGHT: '7' is not the number of an entry (0 to 1)"),
        ("KDPIPE_STUDENT____LR", "1", "KDPIPE_STUDENT____LR does not name a key"),
        ("KDPIPE_", "1", "does not name a key"),
        ("KDPIPE_NAME", "a\nseed = 9", "KDPIPE_NAME: name = a\\nseed = 9: it does not match"),
        ("KDPIPE_DATA__ROOT", "a\udcff", "KDPIPE_DATA__ROOT: the value is not UTF-8 text"),
        ("KDPIPE_SEED", "9" * 5000, "KDPIPE_SEED: seed = 999"),
        ("KDPIPE_SEED", "[" * 5000, "KDPIPE_SEED: seed = [[["),
    ],
)  # fmt: skip
def test_messages_name_the_variable(path, name, text, wanted):
    message = message_for(path, {name: text})
    assert wanted in message
    assert len(message) < 900


def test_messages_name_the_origin_of_a_wrong_value(path):
    assert message_for(path, {"KDPIPE_SEED": "1"}, "seed=x").startswith("--set seed=x: seed = x:")
    path.write_text(TEXT.replace("seed = 3", "seed = -3"))
    assert message_for(path, {"KDPIPE_VIEWS__SEED": "1"}).startswith(f"{path}: seed = -3:")


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
SETTINGS = {
    ("name",): st.text(string.ascii_letters, min_size=1),
    ("seed",): st.integers(0, 2**40),
    ("data", "root"): WORDS,
    ("data", "classes"): st.lists(WORDS, min_size=1, max_size=3),
    ("views", "replay"): st.booleans(),
    ("student", "train", "lr"): st.floats(1e-6, 1.0),
    ("student", "seeds"): st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    ("student", "hard_label_weight"): st.fixed_dictionaries({"start": st.floats(0, 9), "end": st.floats(0, 9)}),
    ("teacher", "model", "args", "width"): st.integers(1, 64),
    ("distill", "0", "temperature"): st.floats(0.5, 20),
    ("distill", "1", "layers", "0"): st.lists(WORDS, min_size=2, max_size=2),
    ("compress", "prune", "kind"): st.sampled_from(["channels", "weights"]),
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_environment_and_set_give_the_same_recipe(tmp_path_factory, chosen):
    path = tmp_path_factory.getbasetemp() / "same.toml"
    path.write_text(TEXT)
    overrides = [f"{'.'.join(keys)}={toml_value(value)}" for keys, value in chosen.items()]
    environ = {"KDPIPE_" + "__".join(keys).upper(): toml_value(value) for keys, value in chosen.items()}
    by_set, by_environment = load_recipe(path, overrides), load_recipe(path, (), environ)
    assert by_set == by_environment
    resolved = recipe_json(by_set)
    for keys, value in chosen.items():
        found = resolved
        for key in keys:
            found = found[int(key)] if isinstance(found, list | tuple) else found[key]
        found = json.loads(json.dumps(found))
        assert (found if not isinstance(value, dict) else {key: found[key] for key in value}) == value


def test_every_key_has_an_origin(path):
    environ = {"KDPIPE_STUDENT__TRAIN__LR": "0.5", "KDPIPE_SEED": "1"}
    overrides = ["seed=2", "student.seeds.1=9", "distill.0.temperature={ start = 1.0, end = 2.0 }"]
    recipe, origins = load_recipe_with_origins(path, overrides, environ)
    assert recipe == load_recipe(path, overrides, environ)
    found = {key: (setting.value, setting.origin) for key, setting in origins.items()}
    assert found["name"] == ("least", str(path))
    assert found["seed"] == (2, "--set")
    assert found["teacher.model.args.width"] == (8, str(path))
    assert found["student.train.lr"] == (0.5, "KDPIPE_STUDENT__TRAIN__LR")
    assert found["student.train.epochs"] == (20, "default")
    assert found["student.seeds"] == ([4, 9], "--set")
    assert found["distill.0.loss"] == ("kd", str(path))
    assert found["distill.0.temperature.end"] == (2.0, "--set")
    assert found["distill.0.temperature.shape"] == ("linear", "default")
    assert found["distill.1.layers"] == ([["stage1", "stage1"]], str(path))
    assert found["compress.prune_train.epochs"] == (10, "default")


def test_plan_shows_keys_that_are_not_default(path, capsys, monkeypatch):
    _, origins = load_recipe_with_origins(
        path, ['data.classes=["x\\u001b[31m" , "' + "y" * 200 + '"]'], {"KDPIPE_SEED": "1"}
    )
    monkeypatch.setattr(printing, "_lines", lambda plan: iter(()))  # those of a plan itself
    plan: dict[str, object] = {}
    print_plan(plan, origins)
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("seed ")] == ["KDPIPE_SEED"]
    assert "student.train.lr" not in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 250
    assert settings_json(origins)["student.train.lr"] == {"value": 0.05, "origin": "default"}
    assert json.dumps(settings_json(origins))
    print_plan(plan)
    assert "KDPIPE_SEED" not in capsys.readouterr().out


def test_an_operation_given_by_its_name_has_the_files_origin(path):
    path.write_text(TEXT + "[views]\noperations = ['RandomCrop']\n")
    _, found = load_recipe_with_origins(path)
    assert found["views.operations.0.name"].origin == str(path)
    assert found["views.num_views"].origin == "default"
