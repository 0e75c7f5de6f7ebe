"""A recipe as TOML: what is written reads as the same recipe."""

import tomllib

import pytest
from support.paths import ROOT

from kdpipe.pipeline.commands.search.best import recipe_toml
from kdpipe.pipeline.recipe.load import load_recipe, parse_recipe

OVERRIDES = (
    'callbacks=["csv", { name = "tensorboard" }]',
    "student.hard_label_weight={ start = 1.0, end = 0.0, epochs = [0, 5] }",
    'data.root="a \\"quoted\\" \\\\ folder 𝒳"',
    'student.model.args={ "1" = "true" }',
)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_written_as_it_was(path):
    for overrides in ((), OVERRIDES):
        recipe = load_recipe(path, overrides)
        text = recipe_toml(recipe)
        assert parse_recipe(tomllib.loads(text), "written") == recipe
        assert len(text.splitlines()) < 80  # without defaults
