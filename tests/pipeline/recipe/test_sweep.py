"""The combinations of a sweep: their names, students and losses, and what is refused."""

import re
import shlex
import tomllib

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.recipe.load import load_recipe, parse_recipe, recipe_json, students_of
from kdpipe.pipeline.recipe.sweep import alone_of, as_override, sweep_overrides
from kdpipe.stages.errors import RecipeError


def points(*overrides, recipe=RECIPE, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    return load_recipe(path, sweep_overrides(overrides)).points


def test_all_combinations_the_last_key_changing_fastest(tmp_path):
    found = points("student.train.lr=0.02,0.05", "distill.0.temperature=1,4.5", tmp_path=tmp_path)
    assert [point.name for point in found] == [
        f"lr={lr},temperature={temperature}" for lr in (0.02, 0.05) for temperature in (1, 4.5)
    ]
    last = found[-1]
    assert (last.student.train.lr, last.losses[0].temperature) == (0.05, 4.5)
    assert last.of_student == {"student.train.lr": 0.05}


def test_a_recipe_has_its_own_sweep(tmp_path):
    table = '[sweep]\nstudent.train.lr = [0.1, 0.2]\n"distill.0.weight" = [0.5]\n'
    found = points(recipe=RECIPE + table, tmp_path=tmp_path)
    assert [dict(point.settings) for point in found] == [
        {"student.train.lr": lr, "distill.0.weight": 0.5} for lr in (0.1, 0.2)
    ]


def test_a_run_reads_its_recipe_with_the_sweep(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, sweep_overrides(["student.train.lr=0.02,0.05"]))
    again = parse_recipe(recipe_json(recipe), "recipe.json", import_code=False)
    assert again.points == recipe.points


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("student.train.lr=0.1", None),
        ("student.train.lr=0.1, 0.2", [0.1, 0.2]),
        ("student.train.schedule=cosine,step", ["cosine", "step"]),
        ("student.mean=[0.5]", None),
        ("student.train.milestones=[1,2]", None),
        ("student.train.milestones=[1,2],[3]", [[1, 2], [3]]),
        ("name=a, or b", None),
        ("student.model.args.wide=true,false", [True, False]),
        (
            'distill.0={loss = "kd"},{loss = "dkd", temperature = 2.0}',
            [{"loss": "kd"}, {"loss": "dkd", "temperature": 2}],
        ),
    ],
)
def test_several_values_are_a_sweep(text, values):
    (found,) = sweep_overrides([text])
    if values is None:
        assert found == text
        return
    key, _, listed = found.partition("=")
    assert key == f"sweep.{text.partition('=')[0]}"
    assert tomllib.loads(f"values = {listed}")["values"] == values


@pytest.mark.parametrize("value", [0.1, True, "cosine", [1, 2], {"start": 1.0, "end": "x"}, "two words"])
def test_a_setting_is_shown_as_an_option_that_can_be_pasted(value):
    option, text = shlex.split(as_override("student.key", value))
    key, _, written = text.partition("=")
    read = written if isinstance(value, str) else tomllib.loads(f"value = {written}")["value"]
    assert (option, key, read) == ("--set", "student.key", value)


def test_keys_with_equal_ends_have_longer_names(tmp_path):
    found = points("distill.0.weight=1,2", "distill.1.weight=3", "sweep.distill.1.weight=[3]", tmp_path=tmp_path)
    assert [point.name for point in found] == ["0.weight=1,1.weight=3", "0.weight=2,1.weight=3"]


def test_names_of_folders_are_plain_and_differ(tmp_path):
    found = points("distill.0.temperature={start = 1.0, end = 4.0},{start = 1.0, end = 2.0}", tmp_path=tmp_path)
    names = [point.name.removeprefix("temperature=") for point in found]
    assert len(set(names)) == 2 and all(re.fullmatch(r"[\w.+-]+", name) for name in names)


def test_points_of_other_losses_share_a_student_alone(tmp_path):
    keys = ("student.hard_label_weight=0.1,0.5", "distill.0.temperature=1,4", "student.train.lr=0.1,0.2")
    found = points(*keys, tmp_path=tmp_path)
    assert len(found) == 8
    assert len({str(alone_of(point)) for point in found}) == 2


def test_networks_and_losses_are_tried_once(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, sweep_overrides(["student.train.lr=0.1,0.2,0.3", "distill.0.temperature=4.0,9.0"]))
    assert len(students_of(recipe)) in (2, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.train.lr=0.1,0.2"], "sweep.teacher.train.lr: .* 'teacher' is not part of the student"),
        (["student.seeds=[0],[1]"], "sweep.student.seeds: .* set student.seeds itself"),
        (["student.train.lr=0.1,0.1"], "sweep.student.train.lr has a value twice"),
        (["sweep.student.train.lr=0.1"], "sweep.student.train.lr = 0.1: name a list of values"),
        (["sweep.student.train.lr=[]"], "name a list of values"),
        (["student.train.epoch=1,2"], "sweep, epoch=1: unknown key 'student.train.epoch'; did you mean"),
        (["student.train.lr=0.1,fast"], "sweep, lr=fast: student.train.lr = fast: "),
        (["distill.9.weight=1,2"], "sweep.distill.9.weight: '9' is not the number of an entry"),
        ([f"student.train.{key}=" + ",".join(map(str, range(1, 200))) for key in ("lr", "weight_decay")], "39,601"),
    ],
)
def test_refused(overrides, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        points(*overrides, tmp_path=tmp_path)
