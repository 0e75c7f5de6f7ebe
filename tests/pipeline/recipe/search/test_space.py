"""The space of a search: its parameters, the student of each choice, presets, and what is refused in one sentence."""

import tomllib

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.recipe.load import parse_recipe, students_of
from kdpipe.pipeline.recipe.search.space import OFF
from kdpipe.stages.errors import RecipeError

VALIDATED = RECIPE.replace("num_train = 200 }", "num_train = 200, validation_share = 0.2 }")
LOSSES = 'distill.1.loss = ["hint", "at", "rkd", "off"]\n'
LAYERS = 'choices = [[["stage2", "stage2"]], [["stage1", "stage1"]]] }\n'
WHEN = f'distill.1.layers = {{ when = {{ "distill.1.loss" = ["hint", "at"] }}, {LAYERS}'
BOTH_PAIRS = VALIDATED.replace('[["stage2", "stage2"]]', '[["stage1", "stage1"], ["stage2", "stage2"]]')


def recipe_with(space, more="", recipe=VALIDATED):
    return parse_recipe(tomllib.loads(f"{recipe}\n[search]\n{more}\n[search.space]\n{space}"), "r.toml")


def test_ranges_choices_and_conditions_are_read():
    space = "distill.0.temperature = { low = 1, high = 20, log = true }\n" + WHEN + LOSSES
    space += "student.train.epochs = { low = 2, high = 6, step = 2 }\n"
    loss, temperature, layers, epochs = recipe_with(space).space.parameters  # losses first
    assert loss.choices == ("hint", "at", "rkd", OFF) and layers.when == {"distill.1.loss": ("hint", "at")}
    assert (temperature.low, temperature.high, temperature.log, temperature.is_whole) == (1.0, 20.0, True, False)
    assert epochs.choices == (2, 4, 6) and epochs.is_whole
    assert layers.is_in({"distill.1.loss": "at"}) and not layers.is_in({"distill.1.loss": "rkd"})


def test_a_choice_makes_the_student_of_a_recipe_with_it():
    space = recipe_with(LOSSES + "student.hard_label_weight = [0.1, { start = 1.0, end = 0.0 }]").space
    layers = (("stage2", "stage2"),)
    for name, weight in {"hint": 0.5, "at": 1000.0, "rkd": 1.0}.items():  # another loss has its own default weight
        loss = space.point({"distill.1.loss": name}, "").losses[1]
        assert (loss.loss, loss.layers, loss.weight) == (name, layers, weight)
    point = space.point({"distill.1.loss": OFF, "student.hard_label_weight": {"start": 1.0, "end": 0.0}}, "")
    assert [loss.loss for loss in point.losses] == ["kd"] and point.student.hard_label_weight.start == 1.0


def test_a_loss_that_is_off_has_no_keys():
    weight = recipe_with(LOSSES + "distill.1.weight = { low = 0.1, high = 1.0 }").space.parameters[1]
    assert weight.is_in({"distill.1.loss": "at"}) and not weight.is_in({"distill.1.loss": OFF})


def test_what_all_choices_need_is_among_the_recipe_s_losses():
    recipe = recipe_with(WHEN + LOSSES)
    found = {(loss.loss, loss.layers) for _, losses in students_of(recipe).values() for loss in losses[1:]}
    deep, early = (("stage2", "stage2"),), (("stage1", "stage1"),)
    assert found == {(name, own) for name in ("hint", "at") for own in (deep, early)} | {("rkd", deep)}


def test_a_grid_has_each_combination_once():
    grid = recipe_with(WHEN + LOSSES + "student.train.lr = [0.1, 0.2]", 'sampler = "grid"').space.grid()
    assert len(grid) == 12 and all(grid.count(own) == 1 for own in grid)  # (2 + 2 + 1 + 1) x 2


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("temperature-and-alpha", {"distill.0.temperature", "distill.0.weight", "student.hard_label_weight"}),
        ("losses", {"distill.0.loss", "distill.1.loss"}),
        ("layers", {"distill.1.layers"}),
    ],
)
def test_presets_are_spaces(preset, keys):
    recipe = recipe_with("student.train.lr = [0.1]", f'preset = "{preset}"', BOTH_PAIRS)
    assert {one.key for one in recipe.space.parameters} == keys | {"student.train.lr"}
    if preset == "layers":
        assert [len(pairs) for pairs in recipe.space.parameters[0].choices] == [1, 1, 2]


RANGE = "distill.0.temperature = "


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("student.train.lrr = [1]", "unknown key 'student.train.lrr'; did you mean 'lr'?"),
        ('student.train.lr = [0.1, "a"]', "student.train.lr = a: it must be a number"),
        ("distill.5.weight = [1]", "'5' is not the number of an entry (0 to 1)"),
        ("teacher.train.lr = [1]", "'teacher' is not part of the student"),
        ("student.seeds = [[1]]", "this key is the same for all settings"),
        ("distill.1.temperature = [2]", "unknown key 'distill.1.temperature'"),
        ('distill.0.loss = ["kd", "dkdd"]', "there is no loss 'dkdd'"),
        (f"{RANGE}3", "name a list of choices"),
        (f"{RANGE}[1, 1]", "has a choice twice"),
        (f"{RANGE}{{ low = 1, hgh = 3 }}", "temperature.hgh: did you mean 'high'?"),
        (f"{RANGE}{{ low = 5, high = 3 }}", "low = 5 must be below high = 3"),
        (f"{RANGE}{{ low = 0, high = 3, log = true }}", "`low` must be above 0"),
        (f"{RANGE}{{ low = 1, high = 4, step = 2 }}", "high = 4 is not low = 1 and a number of steps of 2"),
        (f"{RANGE}{{ low = 1, high = inf }}", "numbers `low` and `high`"),
        (f"{RANGE}{{ low = -1, high = 3 }}", "temperature = -1.0"),
        (f'{RANGE}{{ choices = [1], when = {{ "distill.0.loss" = ["kd"] }} }}', "is not another key of search.space"),
        (f'{RANGE}{{ choices = [1], when = {{ "distill.1.loss" = ["kd"] }} }}\n{LOSSES}', "'kd' is not a choice"),
        (f"{RANGE}{{ choices = [1], when = 3 }}", "when: name choices of another key"),
    ],
)
def test_bad_spaces_are_refused_in_one_sentence(space, told):
    with pytest.raises(RecipeError) as refused:
        recipe_with(space)
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('objective = "parameters"', "one objective must be accuracy or agreement"),
        ('seeds = [0, 1]\npruner = "hyperband"', "with several seeds trials end between seeds"),
        ('pruner = "wilcoxon"', "give search.seeds several"),
        ('objective = ["accuracy", "macs"]\npruner = "hyperband"', "with several objectives"),
        ('sampler = "grid"', "needs choices, or a range with a step"),
        ('preset = "layers"', "give a loss in [[distill]] 2 to 4 pairs"),
        ('objective = ["accuracy", "size"]', "set search.compress = true"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(more, told):
    with pytest.raises(RecipeError, match="r.toml") as refused:
        recipe_with(f"{RANGE}{{ low = 1, high = 2 }}", more)
    assert told in str(refused.value)


def test_compression_is_searched_where_trials_are_compressed():
    ratio = "compress.prune.ratio = { low = 0.1, high = 0.9 }\n"
    space = recipe_with(ratio, "compress = true").space
    assert space.point({"compress.prune.ratio": 0.4}, "").compress.prune.ratio == 0.4
    for more, wrong, told in (
        ("", ratio, "'compress' is not part of the student"),
        ("compress = true", "compress.baselines = [true, false]", "this key is the same for all settings"),
        ("compress = true", ratio.replace("0.9", "1.5"), "ratio = 1.5"),
    ):
        with pytest.raises(RecipeError) as refused:
            recipe_with(wrong, more)
        assert told in str(refused.value)
    with pytest.raises(RecipeError, match=r"name compress\.steps"):
        recipe_with(ratio, "compress = true", VALIDATED.replace("[compress]", "[compress]\nsteps = []"))


def test_a_search_without_validation_images_is_refused():
    with pytest.raises(RecipeError, match=r"set data\.validation_share"):
        recipe_with(f"{RANGE}[1, 2]", recipe=RECIPE)
