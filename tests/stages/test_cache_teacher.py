"""What is stored is what the teacher says: recomputed, by plain zarr, after any interruption."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import zarr
from made_store import folder_bytes
from tiny_road import CACHE, LAYERS, TEACHER, VIEWS, StopAfter, make_tiny_store, squares, tiny_setup

from stages.cache_teacher import cache_teacher
from stages.errors import ModelError, NotFiniteError, RunError, StoppedEarly
from stages.features import tapped
from stages.forms import Wanted
from stages.train_teacher import load_teacher
from stages.views import render
from stages.watch import Watch
from store import FingerprintMismatch, open_store, row_order


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    make_tiny_store(tiny_setup(folder))
    return folder


def teacher_of(run, **changes):
    setup = tiny_setup(run, **changes)
    return load_teacher(TEACHER, 0, setup), setup


def test_stored_equals_recomputed_through_plain_zarr(run):
    teacher, setup = teacher_of(run)
    group = zarr.open_group(run / "store.zarr", mode="r")
    train_set = setup.train_set
    order = row_order(train_set.sample_ids.numpy(), VIEWS.seed)
    for view in range(VIEWS.num_views):
        images = render(train_set.images[order], train_set.sample_ids[order], view, VIEWS)
        with torch.no_grad(), tapped(teacher.model, ["stage2"]) as tap:
            said = tap(teacher.normalise(images))
        np.testing.assert_allclose(group["logits"][view], said.logits.numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(
            group["features/stage2"][view], said.features["stage2"].numpy(), rtol=2e-3, atol=2e-3
        )
    assert group["logits"].dtype == np.float16
    assert np.array_equal(group["samples/ids"][:], train_set.sample_ids[order].numpy())


@pytest.mark.parametrize("num_batches", [1, 2, 8, 13])
def test_a_stopped_and_rerun_job_leaves_the_same_bytes(run, tmp_path, num_batches):
    path = tmp_path / "stopped.zarr"
    teacher, setup = teacher_of(run, watch=Watch(should_stop=StopAfter(num_batches)))
    with pytest.raises(StoppedEarly):
        cache_teacher(CACHE, path, teacher, LAYERS, setup)
    teacher, setup = teacher_of(run)
    result = cache_teacher(CACHE, path, teacher, LAYERS, setup)
    assert result["num_units_computed"] > 0
    assert folder_bytes(path) == folder_bytes(run / "store.zarr")
    assert cache_teacher(CACHE, path, teacher, LAYERS, setup)["num_units_computed"] == 0


def test_the_batch_size_is_not_part_of_the_store(run, tmp_path):
    teacher, setup = teacher_of(run)
    path = tmp_path / "one.zarr"
    cache_teacher(dataclasses.replace(CACHE, batch_size=300), path, teacher, LAYERS, setup)
    one, other = open_store(path), open_store(run / "store.zarr")
    assert one.manifest.identity.fingerprint == other.manifest.identity.fingerprint
    np.testing.assert_allclose(one.read_view("logits", 1), other.read_view("logits", 1), rtol=2e-3, atol=2e-3)


def test_another_view_recipe_data_set_or_teacher_is_refused_pair_by_pair(run, tmp_path):
    teacher, setup = teacher_of(run)
    with pytest.raises(FingerprintMismatch, match=r"views.operations.1.crop.padding: stored 1, wanted 2"):
        changed = dataclasses.replace(setup, views=dataclasses.replace(VIEWS, crop_padding=2))
        cache_teacher(CACHE, run / "store.zarr", teacher, LAYERS, changed)
    with pytest.raises(FingerprintMismatch, match=r"data.pixels_sha256: stored '\w{64}', wanted '\w{64}'"):
        cache_teacher(CACHE, run / "store.zarr", teacher, LAYERS, dataclasses.replace(setup, train_set=squares(300, 9)))
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1e-3)
    with pytest.raises(FingerprintMismatch, match=r"teacher.weights_sha256: stored '\w{64}', wanted '\w{64}'"):
        cache_teacher(CACHE, run / "store.zarr", teacher, LAYERS, setup)


def test_nan_stops_the_job_and_names_the_samples(run, tmp_path):
    teacher, setup = teacher_of(run)
    with torch.no_grad():
        teacher.model.fc.bias[2] = float("nan")
    first = row_order(setup.train_set.sample_ids.numpy(), VIEWS.seed)[0]
    with pytest.raises(NotFiniteError, match=rf"logits of samples \[{int(setup.train_set.sample_ids[first])}, "):
        cache_teacher(CACHE, tmp_path / "nan.zarr", teacher, LAYERS, setup)


def test_logits_beyond_float16_are_refused_with_the_way_out(run, tmp_path):
    teacher, setup = teacher_of(run)
    with torch.no_grad():
        teacher.model.fc.bias[2] = 1e5
    with pytest.raises(NotFiniteError, match="beyond float16's range: set cache.dtype = 'float32'"):
        cache_teacher(CACHE, tmp_path / "large.zarr", teacher, LAYERS, setup)
    cache_teacher(dataclasses.replace(CACHE, dtype="float32"), tmp_path / "wide.zarr", teacher, LAYERS, setup)
    assert open_store(tmp_path / "wide.zarr").read_view("logits", 0).max() > 9e4


def test_a_wrong_layer_lists_the_near_ones(run, tmp_path):
    teacher, setup = teacher_of(run)
    with pytest.raises(ModelError, match="stage2"):
        cache_teacher(CACHE, tmp_path / "layer.zarr", teacher, [Wanted("stag2")], setup)
    assert not (tmp_path / "layer.zarr").exists()


def test_too_little_disk_is_refused_before_anything_is_computed(run, tmp_path, monkeypatch):
    teacher, setup = teacher_of(run)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match=r"needs [\d,]+ bytes more and its disk has 1,000 free"):
        cache_teacher(CACHE, tmp_path / "full.zarr", teacher, LAYERS, setup)
    assert not (tmp_path / "full.zarr").exists()
