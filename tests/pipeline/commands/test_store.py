"""`kdpipe store`: output, JSON document and exit status of each command."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from support.kdpipe_process import RECIPE, environment, kdpipe_here
from support.made_store import folder_bytes

from kdpipe.store import claim, ensure_store
from kdpipe.store.format.markers import marker_path
from kdpipe.store.format.shard import shard_path

SMALL = RECIPE.replace("num_views = 30", "num_views = 3").replace("epochs = 6", "epochs = 1")


def shown(*arguments, code=0):
    ended = kdpipe_here("store", *arguments)
    assert ended.exit_code == code, ended.output
    return ended.stdout


def document(*arguments, code=0):
    return json.loads(shown(*arguments, "--json", code=code))


def spoil(path):
    with path.open("r+b") as file:
        file.write(b"????")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe and its run folder, with a trained teacher and a store."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.toml"
    recipe.write_text(SMALL)
    for stage in ("train-teacher", "cache-teacher"):
        assert kdpipe_here(stage, recipe, "--run", folder / "run").exit_code == 0
    return recipe, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def recipe(finished):
    return finished[0]


def test_nothing_heavy_is_imported_before_a_command():
    heavy = "{'torch', 'zarr', 'numpy', 'pydantic', 'numcodecs'}"
    code = f"import sys, kdpipe.pipeline.store_app; print(sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_advise_compares_encodings_for_the_losses(run, recipe):
    found = document("advise", recipe, "--run", run)
    by_name = {one["name"]: one for one in found["encodings"]}
    sizes = {name: one["row_bytes"] for name, one in by_name.items()}
    assert sizes == {"float16": 20, "int8": 14, "int4": 9, "head": 2 * 64}
    assert by_name["head"]["kl"]["4"] < 1e-6 and by_name["head"]["gradient_cosine"]["4"] > 0.9999
    assert set(by_name["int8"]["kl"]) == {"4"}
    assert found["recommended"] in by_name
    assert document("advise", recipe, "--run", run, "--max-kl", "1")["recommended"] == "int4"
    text = shown("advise", run / "store.zarr")
    assert "KL, T" in text
    assert "Recommended: " in text


def test_advise_needs_logits_of_all_classes(run, recipe):
    shown("transcode", run / "store.zarr", run.parent / "few.zarr", "--sampled-labels", "2")
    assert "probabilities at T = 1, largest error" in shown("info", run.parent / "few.zarr")
    ended = kdpipe_here("store", "advise", run.parent / "few.zarr")
    assert (ended.exit_code, "2 of 10 classes sampled" in ended.stderr) == (1, True)
    own = "cache.store=few.zarr", "--run", run.parent / "none", "--set", "name=none"
    shutil.rmtree(run)
    ended = kdpipe_here("store", "advise", recipe, "--set", *own)
    assert ended.exit_code == 1
    assert "neither a store with all logits nor a trained teacher" in ended.stderr


def test_verify_needs_no_torch(made):
    code = f"""
import sys
from kdpipe.pipeline.main import app
try:
    app(["store", "verify", {str(made.path)!r}])
finally:
    print(sorted({{"torch", "torchvision", "sklearn"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "no faults found" in ended.stdout
    assert ended.stdout.endswith("[]\n")


def test_verify_of_an_intact_store(made):
    text = shown("verify", made.path)
    assert f"{len(made.units)} of {len(made.units)} units are complete" in text
    assert "no faults found" in text
    result = document("verify", made.path)
    assert result["path"] == str(made.path)
    assert result["damaged"] == result["missing"] == []
    assert result["num_bytes"] == sum(map(len, folder_bytes(made.path).values()))


def test_verify_names_every_fault_and_exits_1(made):
    spoil(shard_path(made.path, made.manifest.arrays[0], made.units[0]))
    spoil(made.path / "logits" / "zarr.json")
    text = shown("verify", made.path, code=1)
    assert "damaged      logits/zarr.json" in text
    assert f"damaged      logits/c/0/0/0 ({made.units[0]}, logits)" in text
    assert "2 faults: run `kdpipe store repair RECIPE`" in text
    assert [fault["unit"] for fault in document("verify", made.path, code=1)["damaged"]] == [None, str(made.units[0])]


def test_verify_exits_3_if_units_are_only_missing(store_maker):
    made = store_maker(fill=False)
    made.fill(made.units[1:])
    assert f"missing      {made.units[0]}: logits, features/layer2.0" in shown("verify", made.path, code=3)
    assert document("verify", made.path, code=3)["missing"][0]["unit"] == str(made.units[0])


def test_verify_recomputes_with_the_recipes_teacher(recipe, run):
    options = ("--recompute", 20, "--recipe", recipe, "--run", run)
    assert "20 samples were recomputed" in shown("verify", run / "store.zarr", *options)
    result = document("verify", run / "store.zarr", *options)
    assert result["recomputed"]["num_rows"] == 20
    assert result["recomputed"]["differing"] == []
    other = kdpipe_here("store", "verify", run / "store.zarr", *options, "--set", "views.seed=5")
    assert other.exit_code == 12
    assert "views.seed: stored 0, wanted 5" in other.stderr


@pytest.mark.parametrize("options", [("--recompute", "3"), ("--recipe", "some.toml"), ("--recompute", "0")])
def test_recompute_and_recipe_need_each_other(made, options):
    assert kdpipe_here("store", "verify", made.path, *options).exit_code == 2


def test_repair_restores_the_bytes(recipe, run):
    path = run / "store.zarr"
    intact = folder_bytes(path)
    assert "0 faults found, 0 units recomputed" in shown("repair", recipe, "--run", run)
    spoil(path / "logits" / "c" / "1" / "0" / "0")
    spoil(path / "samples" / "ids" / "c" / "0")
    result = document("repair", recipe, "--run", run)
    assert len(result["found"]) >= 2
    assert result["num_units_computed"] == 1
    assert result["damaged"] == []
    assert folder_bytes(path) == intact


def test_repair_without_store_or_teacher_is_one_sentence(recipe, run, tmp_path):
    shutil.rmtree(run / "store.zarr")
    none = kdpipe_here("store", "repair", recipe, "--run", run)
    assert none.exit_code == 1
    assert "there is no store at" in none.stderr
    untrained = kdpipe_here("store", "repair", recipe, "--run", tmp_path / "other")
    assert untrained.exit_code == 1
    assert "kdpipe train-teacher" in untrained.stderr
    assert not (tmp_path / "other").exists()


def test_rm_views_removes_views(made):
    assert "1 views removed, 1 kept" in shown("rm-views", made.path, "--keep", 1)
    assert document("rm-views", made.path, "--keep", 1)["bytes_freed"] == 0
    assert document("verify", made.path)["num_units"] == len(made.units) // 2
    refused = kdpipe_here("store", "rm-views", made.path, "--keep", 2)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "keep from 1 to 1 of them, not 2" in refused.stderr


def test_info_shows_progress_and_who_computes(made):
    layout = dataclasses.replace(made.manifest.layout, num_views=4)
    ensure_store(made.path, dataclasses.replace(made.manifest, layout=layout), made.samples)
    units = layout.units()
    worker = claim(made.path, units[-1].key)
    result = document("info", made.path)
    assert result["being_added"] == {"num_views": 2, "num_samples": 0, "arrays": []}
    assert list(result["at_work"]) == [str(units[-1])]
    assert result["profile"] == "zero-copy"
    assert result["view_bytes"] * 4 == result["store_bytes"]
    assert result["disk_bytes"] * 2 == result["store_bytes"]
    text = shown("info", made.path)
    worker.release()
    assert f"at work      {units[-1]}: process {os.getpid()}" in text
    assert "finished     2 views of 2,500 samples" in text
    assert "being added  2 views" in text


def test_info_shows_the_encoding_error(run):
    text = shown("info", run / "store.zarr")
    assert "fidelity     logits: KL " in text
    assert "at T=1, " in text
    assert "top-1 flips" in text
    assert "fidelity     features/stage2: largest error" in text
    fidelity = document("info", run / "store.zarr")["finished"]["fidelity"]
    assert set(fidelity["logits"]["kl"]) == {"1", "2", "4", "8", "20"}


def test_a_damaged_marker_does_not_end_info(made):
    spoil(marker_path(made.path, made.units[0]))
    assert document("info", made.path)["missing_units"] == [str(made.units[0])]
