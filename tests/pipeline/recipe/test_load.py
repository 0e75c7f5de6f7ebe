"""Recipes are read strictly: a message names the key, the value and the remedy."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT

from kdpipe.pipeline.recipe.load import load_recipe, parse_recipe, recipe_json
from kdpipe.stages.errors import RecipeError

RECIPES = ROOT / "recipes"

MINIMAL = """
name = "least"
teacher = { model = { name = "cnn" }, train = { epochs = 1 } }
student = { model = { name = "cnn" } }
"""


def message_for(tmp_path, text, *overrides):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_bundled_recipes_are_valid_and_round_trip(path):
    recipe = load_recipe(path)
    resolved = json.loads(json.dumps(recipe_json(recipe)))
    assert parse_recipe(resolved, "resolved") == recipe
    assert path.read_text().startswith("# ")
    for word in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert word in path.read_text()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("nmae = 'x'", r"unknown key 'nmae'; did you mean 'name'?"),
        ("[compress.prune_train]\nepoch = 3", "unknown key 'compress.prune_train.epoch'; did you mean 'epochs'?"),
        ("[views]\nnum_view = 3", "unknown key 'views.num_view'; did you mean 'num_views'?"),
        ("[[distill]]\nloss = 'kd'\ntempertaure = 3", "did you mean 'temperature'?"),
        ("[data]\nzzz = 1", "unknown key 'data.zzz'; known here: name, task, root,"),
        ("[views]\nnum_views = 0", "views.num_views = 0: it must be at least 1"),
        ("[views]\nnum_views = '4'", "views.num_views = 4: it must be a whole number"),
        ("[views]\nreplay = 1", "views.replay = 1: it must be true or false"),
        ("[cache]\nbatch_size = 'big'", "cache.batch_size = big: it must be a whole number, or 'auto'"),
        ("[cache]\nprecision = 'bf16'", "it must be 'auto', 'float32', 'tf32', 'bfloat16' or 'float16'"),
        ("[cache]\ndtype = 'int8'", "cache.dtype = int8: it must be 'float16' or 'float32'"),
        ("[[distill]]\nloss = 'magic'", "distill.0"),
        ("[[distill]]\nweight = 1.0", "distill.0"),
        ("[compress.prune]\nratio = nan", "compress.prune.ratio"),
        ("seed = 1979-05-27", "seed = 1979-05-27"),
        ("seed = -1", "seed = -1: it must be at least 0"),
        ("device = 'tpu'", "device = tpu"),
    ],
)
def test_messages_name_the_fault(tmp_path, line, wanted):
    assert wanted in message_for(tmp_path, line + "\n" + MINIMAL if "[" not in line else MINIMAL + line)


def test_a_loss_on_gradients_is_refused_with_compile(tmp_path):
    message = message_for(tmp_path, MINIMAL + "[[distill]]\nloss = 'at_gradient'", "student.train.compile=true")
    assert "no second derivative: set student.train.compile = false" in message


def test_a_missing_key_is_named(tmp_path):
    assert "the key 'student' is missing" in message_for(tmp_path, MINIMAL.replace("student =", "# student ="))


def test_unreadable_files_and_invalid_toml_are_refused(tmp_path):
    assert "not valid TOML" in message_for(tmp_path, "name = ")
    assert "cannot read the recipe" in message_for_path(tmp_path / "none.toml")
    assert "cannot read the recipe" in message_for_path(tmp_path)


def message_for_path(path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_overrides_take_toml_values_and_bare_words(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(MINIMAL + "[[distill]]\nloss = 'kd'\n")
    overrides = [
        "student.train.lr=0.25",
        "student.seeds=[4, 5]",
        "teacher.model.name=mlp",
        "data.download=false",
        "distill.0.temperature=2",
        "teacher.model.args.hidden=[8]",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.student.train.lr == 0.25
    assert recipe.student.seeds == (4, 5)
    assert recipe.teacher.model.name == "mlp"
    assert recipe.data.download is False
    assert recipe.distill[0].temperature == 2
    assert recipe.teacher.model.args == {"hidden": [8]}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("student.train.lr", "--set takes key=value"),
        ("=3", "--set takes key=value"),
        ("student.train.rl=1", "did you mean 'lr'?"),
        ("name.x=1", "'name' is not a section"),
        ("distill.3.weight=1", "'3' is not the number of an entry"),
        ("student.train.lr=fast", "student.train.lr = fast: it must be a number"),
    ],
)
def test_messages_name_the_invalid_override(tmp_path, override, wanted):
    assert wanted in message_for(tmp_path, MINIMAL + "[[distill]]\nloss = 'kd'\n", override)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["name", "data", "views", "teacher", "student", "distill", "compress", "cache", "seed"]),
)
def test_any_value_is_read_or_refused_in_one_line(value, key):
    table = {
        "name": "least",
        "teacher": {"model": {"name": "cnn"}},
        "student": {"model": {"name": "cnn"}},
        key: value,
    }
    try:
        parse_recipe(table, "fuzzed")
    except RecipeError as error:
        assert len(str(error)) < 600


def test_docs_explain_every_key():
    from dataclasses import fields, is_dataclass
    from typing import get_args, get_type_hints

    from kdpipe.pipeline.recipe.load import Recipe
    from kdpipe.stages.losses.registry import LOSSES

    text = (RECIPES.parent / "docs" / "recipes.md").read_text()
    seen, waiting = set(), [Recipe, *LOSSES.builtin.values()]
    while waiting:
        kind = waiting.pop()
        if is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            for field in fields(kind):
                assert re.search(rf"[`.]{field.name}[`.]|\[{field.name}\]", text), f"{kind.__name__}.{field.name}"
            waiting += get_type_hints(kind).values()
        else:
            waiting += get_args(kind)
    assert len(seen) >= 10
