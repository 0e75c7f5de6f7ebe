"""A recipe in its run folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.recipe.dry_build import dry_build
from kdpipe.pipeline.recipe.load import load_recipe
from kdpipe.pipeline.run import Run
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.store.errors import LinkedStoreError
from kdpipe.store.fs.safe_read import read_regular_file


def test_links_are_followed_from_the_start(tmp_path: Path) -> None:
    store, outside = tmp_path / "store.zarr", tmp_path / "outside"
    store.mkdir()
    outside.write_text("{}")
    (store / "zarr.json").symlink_to(outside)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    for wanted in (False, True):
        follow = [f"student.target_loading.follow_links={str(wanted).lower()}"]
        Run(load_recipe(recipe, follow, {}), tmp_path, RunMonitor())
        if wanted:
            assert read_regular_file(store / "zarr.json", 10, store) == b"{}"
        else:
            with pytest.raises(LinkedStoreError):
                read_regular_file(store / "zarr.json", 10, store)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["cache.sampled_labels=4"],
            r"distill\.0 \(kd\): these sampled labels are",
        ),
        (["cache.top_k=4", "distill.0.temperature=30"], r"distill\.0 \(kd\): these top-k logits cover temperatures"),
    ],
)
def test_losses_are_held_against_the_encoding_before_the_teacher(
    overrides: list[str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.toml", overrides, {})
    with pytest.raises(RecipeError, match=told):
        Run(recipe, tmp_path / "run", RunMonitor()).check_losses_fit()
    assert any(re.search(told, fault) for fault in dry_build(recipe)[0])
