"""A recipe in its run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.recipe.load import load_recipe
from kdpipe.pipeline.run import Run
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
