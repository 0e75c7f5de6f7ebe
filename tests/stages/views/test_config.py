from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from kdpipe.pipeline.recipe.load import parse_recipe, recipe_json
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.config import Views


def test_views_are_written_in_python_as_in_a_recipe():
    written = TypeAdapter(Views).validate_json('{"num_views": 8, "operations": ["RandomCrop", {"name": "A"}]}')
    assert Views(8, ["RandomCrop", {"name": "A"}]) == written
    assert written.operations == ({"name": "RandomCrop"}, {"name": "A"})
    assert replace(written, num_views=2) == Views(2, written.operations)


def test_arguments_become_those_of_the_recipes_json():
    table = {"name": "RandomCrop", "size": (9, 7)}
    views = Views(8, [table])
    table["size"] = (1, 1)
    assert views.operations == ({"name": "RandomCrop", "size": [9, 7]},)


@pytest.mark.parametrize(
    ("operations", "sentence"),
    [
        ("RandomCrop", r"operations are a list, as in \['RandomCrop'\]"),
        ([3], "a table"),
        ([{"name": "Resize", "interpolation": object()}], "a name, or a table of a name and plain arguments"),
    ],
)
def test_other_operations_are_refused(operations, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Views(8, operations)


def test_only_number_and_operations_are_positional():
    with pytest.raises(RecipeError, match="takes its settings by name"):
        Views(8, [], 3)


def test_a_named_operation_survives_the_runs_recipe():
    table = {
        "name": "short",
        "data": {"name": "digits"},
        "views": {"operations": ["RandomHorizontalFlip"]},
        "teacher": {"model": {"name": "cnn"}},
        "student": {"model": {"name": "cnn"}},
        "distill": [{"loss": "kd"}],
    }
    recipe = parse_recipe(table, "here")
    record = json.loads(json.dumps(recipe_json(recipe)))
    assert record["views"]["operations"] == [{"name": "RandomHorizontalFlip"}]
    assert parse_recipe(record, "there") == recipe
    with pytest.raises(RecipeError, match=r"^here: views.operations.0 = 3: it must be a table"):
        parse_recipe(table | {"views": {"operations": [3]}}, "here")
