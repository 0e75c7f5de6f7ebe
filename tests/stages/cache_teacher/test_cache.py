"""Tests of caching a teacher: stored numbers, interruptions, extensions, errors."""

import dataclasses
import errno
import shutil

import numpy as np
import pytest
import torch
import zarr
from support.device import DEVICE
from support.made_store import folder_bytes
from support.tiny_run import (
    CACHE,
    LAYERS,
    OPERATIONS,
    TEACHER,
    VIEWS,
    StopAfter,
    make_tiny_store,
    squares,
    subset,
    tiny_context,
)
from torch import nn

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.estimate import plan_cache, probe
from kdpipe.stages.cache_teacher.plan import plan_store, samples_in_row_order
from kdpipe.stages.errors import ModelError, NotFiniteError, RecipeError, RunError, StoppedEarly
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.launcher import WorkShard
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views.renderer import Renderer
from kdpipe.store import (
    FingerprintMismatch,
    LockedError,
    StoreError,
    TranscodeOptions,
    claim,
    ensure_store,
    open_store,
    row_order,
    transcode,
)
from kdpipe.store.write import writer

NUM_UNITS = 3
"""Of 300 samples, one a view."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    make_tiny_store(tiny_context(folder))
    return folder


def teacher_of(run, **changes):
    context = tiny_context(run, **changes)
    return load_teacher(TEACHER, 0, context), context


def test_stored_equals_recomputed_through_plain_zarr(run):
    teacher, context = teacher_of(run)
    group = zarr.open_group(run / "store.zarr", mode="r")
    train_set = context.train_set
    order = row_order(train_set.sample_ids.numpy(), VIEWS.seed)
    renderer = Renderer(VIEWS, 1, (8, 8))
    for view in range(VIEWS.num_views):
        images = renderer.render_batch(train_set.images[order], train_set.sample_ids[order], view)
        with torch.no_grad(), extract_features(teacher.model, ["stage2"]) as extractor:
            outputs = extractor(teacher.normalize(images.to(DEVICE)))
        np.testing.assert_allclose(group["logits"][view], outputs.logits.cpu().numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(
            group["features/stage2"][view], outputs.features["stage2"].cpu().numpy(), rtol=2e-3, atol=2e-3
        )
    assert group["logits"].dtype == np.float16
    assert np.array_equal(group["samples/ids"][:], train_set.sample_ids[order].numpy())


@pytest.mark.parametrize("num_batches", [1, 2, 8, 13])
def test_a_stopped_and_rerun_job_leaves_the_same_bytes(run, tmp_path, num_batches):
    path = tmp_path / "stopped.zarr"
    teacher, context = teacher_of(run, monitor=RunMonitor(should_stop=StopAfter(num_batches)))
    with pytest.raises(StoppedEarly):
        cache_teacher(CACHE, path, teacher, LAYERS, context)
    teacher, context = teacher_of(run)
    result = cache_teacher(CACHE, path, teacher, LAYERS, context)
    assert result["num_units_computed"] > 0
    assert folder_bytes(path) == folder_bytes(run / "store.zarr")
    assert cache_teacher(CACHE, path, teacher, LAYERS, context)["num_units_computed"] == 0


def test_the_batch_size_is_not_part_of_the_store(run, tmp_path):
    teacher, context = teacher_of(run)
    path = tmp_path / "one.zarr"
    cache_teacher(dataclasses.replace(CACHE, batch_size=300), path, teacher, LAYERS, context)
    one, other = open_store(path), open_store(run / "store.zarr")
    assert one.manifest.identity.fingerprint == other.manifest.identity.fingerprint
    np.testing.assert_allclose(one.read_view("logits", 1), other.read_view("logits", 1), rtol=2e-3, atol=2e-3)


def test_other_views_data_or_teacher_is_an_error(run, tmp_path):
    teacher, context = teacher_of(run)
    with pytest.raises(FingerprintMismatch, match=r"views.operations: stored .*RandomHorizontalFlip.*, wanted "):
        changed = dataclasses.replace(context, views=dataclasses.replace(VIEWS, operations=OPERATIONS[:1]))
        cache_teacher(CACHE, run / "store.zarr", teacher, LAYERS, changed)
    with pytest.raises(FingerprintMismatch, match=r"data.pixels_sha256: stored '\w{12}\.\.\.', wanted '\w{12}\.\.\.'"):
        cache_teacher(
            CACHE, run / "store.zarr", teacher, LAYERS, dataclasses.replace(context, train_set=squares(300, 9))
        )
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1e-3)
    with pytest.raises(
        FingerprintMismatch, match=r"teacher.weights_sha256: stored '\w{12}\.\.\.', wanted '\w{12}\.\.\.'"
    ):
        cache_teacher(CACHE, run / "store.zarr", teacher, LAYERS, context)


def test_a_layer_that_is_overwritten_in_place_is_marked(run, tmp_path, monkeypatch):
    features = [FeatureSpec("stage1.1"), FeatureSpec("stage2")]
    plain, context = teacher_of(run)
    in_place, _ = teacher_of(run)
    for module in in_place.model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    cache_teacher(CACHE, tmp_path / "plain.zarr", plain, features, context)
    cache_teacher(CACHE, tmp_path / "in_place.zarr", in_place, features, context)
    one, other = open_store(tmp_path / "plain.zarr"), open_store(tmp_path / "in_place.zarr")
    assert np.array_equal(one.read_view("features/stage1.1", 1), other.read_view("features/stage1.1", 1))
    assert [spec.name for spec in other.arrays if spec.own_output] == ["features/stage1.1"]
    assert [spec.name for spec in one.arrays if spec.own_output] == []
    monkeypatch.setattr("kdpipe.stages.cache_teacher.plan.overwritten_layers", lambda *_: ())  # as before the mark
    with pytest.raises(FingerprintMismatch, match=r"arrays.features/stage1.1.own_output"):
        cache_teacher(CACHE, tmp_path / "in_place.zarr", in_place, features, context)
    cache_teacher(CACHE, tmp_path / "in_place.zarr", in_place, features[1:], context)


def test_nan_stops_the_job_and_names_the_samples(run, tmp_path):
    teacher, context = teacher_of(run)
    with torch.no_grad():
        teacher.model.fc.bias[2] = float("nan")
    first = row_order(context.train_set.sample_ids.numpy(), VIEWS.seed)[0]
    with pytest.raises(NotFiniteError, match=rf"logits of samples \[{int(context.train_set.sample_ids[first])}, "):
        cache_teacher(CACHE, tmp_path / "nan.zarr", teacher, LAYERS, context)


def test_logits_beyond_float16_are_refused_with_the_way_out(run, tmp_path):
    teacher, context = teacher_of(run)
    with torch.no_grad():
        teacher.model.fc.bias[2] = 1e5
    with pytest.raises(NotFiniteError, match="beyond float16's range: set cache.dtype = 'float32'"):
        cache_teacher(CACHE, tmp_path / "large.zarr", teacher, LAYERS, context)
    cache_teacher(dataclasses.replace(CACHE, dtype="float32"), tmp_path / "wide.zarr", teacher, LAYERS, context)
    assert open_store(tmp_path / "wide.zarr").read_view("logits", 0).max() > 9e4


def test_a_wrong_layer_lists_the_near_ones(run, tmp_path):
    teacher, context = teacher_of(run)
    with pytest.raises(ModelError, match="stage2"):
        cache_teacher(CACHE, tmp_path / "layer.zarr", teacher, [FeatureSpec("stag2")], context)
    assert not (tmp_path / "layer.zarr").exists()


def test_too_little_disk_is_refused_before_anything_is_computed(run, tmp_path, monkeypatch):
    teacher, context = teacher_of(run)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match=r"needs [\d,]+ bytes more and its disk has 1,000 free"):
        cache_teacher(CACHE, tmp_path / "full.zarr", teacher, LAYERS, context)
    assert not (tmp_path / "full.zarr").exists()


def test_last_part_finishes_the_store(run, tmp_path):
    path = tmp_path / "parts.zarr"
    teacher, context = teacher_of(run)
    results = [
        cache_teacher(CACHE, path, teacher, LAYERS, context, work_shard=WorkShard(i, 3, "--part")) for i in (2, 0, 1)
    ]
    assert [result["num_units_missing"] > 0 for result in results] == [True, True, False]
    assert sum(result["num_units_computed"] for result in results) == NUM_UNITS
    assert folder_bytes(path) == folder_bytes(run / "store.zarr")


def test_unit_claimed_by_another_job_is_skipped_and_named(run, tmp_path):
    path = tmp_path / "shared.zarr"
    teacher, context = teacher_of(run)
    cache_teacher(CACHE, path, teacher, LAYERS, context, work_shard=WorkShard(0, NUM_UNITS, "--part"))
    claimed = claim(path, "v1-s0")
    with pytest.raises(LockedError, match=r"1 units of .*: view 1, shard 0 is being computed by process \d+ on "):
        cache_teacher(CACHE, path, teacher, LAYERS, context)
    with pytest.raises(StoreError, match="not complete: view 1, shard 0 is missing"):
        open_store(path)
    claimed.release()
    assert cache_teacher(CACHE, path, teacher, LAYERS, context)["num_units_computed"] == 1
    assert folder_bytes(path) == folder_bytes(run / "store.zarr")


def test_extension_adds_data_without_rewriting(run, tmp_path):
    path = tmp_path / "grown.zarr"
    teacher, context = teacher_of(run)
    few = dataclasses.replace(
        context, train_set=subset(context.train_set, 200), views=dataclasses.replace(VIEWS, num_views=2)
    )
    cache_teacher(CACHE, path, teacher, [], few)
    files = [file for file in (path / "logits" / "c").rglob("*") if file.is_file()]
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in files}
    opened = open_store(path)
    cache_teacher(CACHE, path, teacher, LAYERS, context)
    assert all((file.stat().st_ino, file.read_bytes()) == was for file, was in before.items())
    grown, whole = open_store(path), open_store(run / "store.zarr")
    ids = context.train_set.sample_ids.numpy()
    for name in ("logits", "features/stage2"):
        for view in range(VIEWS.num_views):
            np.testing.assert_allclose(
                grown.gather(name, view, ids), whole.gather(name, view, ids), rtol=2e-3, atol=2e-3
            )
    known = few.train_set.sample_ids.numpy()
    assert np.array_equal(opened.gather("logits", 1, known), grown.gather("logits", 1, known))
    assert cache_teacher(CACHE, path, teacher, [], few)["num_units_computed"] == 0  # it wants less than is there


def test_statistics_of_maps_match_their_formulas(run, tmp_path):
    teacher, context = teacher_of(run)
    forms = [FeatureSpec("stage2", form) for form in ("features", "pooled", "attention", "gram")]
    cache_teacher(dataclasses.replace(CACHE, dtype="float32"), tmp_path / "forms.zarr", teacher, forms, context)
    store = open_store(tmp_path / "forms.zarr")
    maps = torch.from_numpy(store.read_view("features/stage2", 1)).double()
    energy = maps.pow(2).mean(1)
    wanted = {
        "pooled/stage2": maps.mean((2, 3)),
        "attention/stage2": energy / energy.flatten(1).norm(dim=1)[:, None, None],
        "gram/stage2": torch.einsum("bchw,bdhw->bcd", maps, maps) / maps[0, 0].numel(),
    }
    for name, expected in wanted.items():
        np.testing.assert_allclose(store.read_view(name, 1), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert store.layers == ("stage2",)


def test_top_k_store_matches_the_dense_one(run, tmp_path):
    teacher, context = teacher_of(run)
    result = cache_teacher(dataclasses.replace(CACHE, top_k=2), tmp_path / "top.zarr", teacher, [], context)
    assert list(result["arrays"]) == ["logits/packed"]
    top, dense = open_store(tmp_path / "top.zarr"), open_store(run / "store.zarr")
    ids = context.train_set.sample_ids.numpy()[:64]
    exact = torch.from_numpy(dense.gather("logits", 1, ids)).float().to(DEVICE)
    targets = Targets([join(top, context.train_set, [])], DEVICE).batch(1, torch.arange(64))[0]
    for temperature in (1.0, 2.7, 4.0, 20.0):
        found = torch.softmax(targets.logits_at(temperature) / temperature, 1)
        wanted = torch.softmax(exact / temperature, 1)
        kept = wanted.topk(2).indices
        assert (found.gather(1, kept) - wanted.gather(1, kept)).abs().max() < 2e-3
    assert set(top.fidelity["logits"]["kl"]) == {"1", "2", "4", "8", "20"}


def test_older_top_k_store_is_continued_as_it_is(run, tmp_path):
    teacher, context = teacher_of(run)
    config, path = dataclasses.replace(CACHE, top_k=2), tmp_path / "older.zarr"
    samples = samples_in_row_order(context)
    planned = plan_store(config, teacher, [], samples, context)
    older = dataclasses.replace(planned.encoding, dtype=None)
    ensure_store(path, dataclasses.replace(planned, encoding=older, arrays=older.arrays("float16")), samples)
    result = cache_teacher(config, path, teacher, [], context)
    assert list(result["arrays"]) == ["logits/values", "logits/indices", "logits/tail"]
    cache_teacher(config, tmp_path / "new.zarr", teacher, [], context)
    old, new = open_store(path), open_store(tmp_path / "new.zarr")
    assert old.fidelity == new.fidelity
    for temperature in (1.0, 3.3):
        assert np.array_equal(old.logits(1, samples.ids, temperature), new.logits(1, samples.ids, temperature))
        found = [
            Targets([join(store, context.train_set, [])], DEVICE).batch(1, torch.arange(64))[0] for store in (old, new)
        ]
        assert torch.equal(*[one.logits_at(temperature) for one in found])


@pytest.mark.parametrize("encoding", [{"encoding": "int8"}, {"encoding": "int4"}, {"sampled_labels": 3}])
def test_encoded_store_is_that_of_the_dense_logits(run, tmp_path, encoding):
    teacher, context = teacher_of(run)
    config, path = dataclasses.replace(CACHE, dtype="float32", **encoding), tmp_path / "encoded.zarr"
    cache_teacher(dataclasses.replace(CACHE, dtype="float32"), tmp_path / "dense.zarr", teacher, [], context)
    cache_teacher(config, path, teacher, [], context)
    transcode(tmp_path / "dense.zarr", tmp_path / "transcoded.zarr", TranscodeOptions(**encoding))
    found, wanted = open_store(path), open_store(tmp_path / "transcoded.zarr")
    assert found.manifest.encoding == wanted.manifest.encoding
    ids, rows = context.train_set.sample_ids, torch.arange(64)
    targets = Targets([join(found, context.train_set, [])], DEVICE)
    for view in range(VIEWS.num_views):
        decoded = wanted.logits(view, ids.numpy()[:64])
        assert np.array_equal(targets.batch(view, rows)[0].logits_at(1.0).cpu().numpy(), decoded)
    assert found.fidelity["logits"]["num_rows"] == 300 * VIEWS.num_views


def test_encodings_that_do_not_fit_are_refused(run, tmp_path):
    teacher, context = teacher_of(run)
    with pytest.raises(FingerprintMismatch, match="encoding: stored None, wanted .*int8"):
        cache_teacher(dataclasses.replace(CACHE, encoding="int8"), run / "store.zarr", teacher, [], context)
    for fault, keys in {
        "cache.top_k = 4 keeps all of 4 classes": {"top_k": 4},
        "cache.sampled_labels = 5 keeps all of 4 classes": {"sampled_labels": 5},
        "cache.encoding and cache.top_k each say": {"top_k": 2, "encoding": "int8"},
    }.items():
        with pytest.raises(RecipeError, match=fault):
            cache_teacher(dataclasses.replace(CACHE, **keys), tmp_path / "all.zarr", teacher, [], context)


def test_store_records_encoding_errors(run):
    lost = open_store(run / "store.zarr").fidelity
    assert lost["logits"]["num_rows"] == 300 * VIEWS.num_views
    assert 0 < lost["logits"]["largest_error"] < 1e-2
    assert 0 < lost["logits"]["kl"]["1"] < 1e-5
    assert 0 < lost["features/stage2"]["relative_rms"] < 1e-3


def test_full_disk_stops_the_job_and_a_rerun_continues(run, tmp_path, monkeypatch):
    path, real, left = tmp_path / "refused.zarr", writer.write_atomically, [5]
    teacher, context = teacher_of(run)

    def refuse(target, *parts):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, *parts)

    monkeypatch.setattr(writer, "write_atomically", refuse)
    with pytest.raises(StoreError, match=r"the disk is full; [\d,]+ bytes are needed there and [\d,]+ are free"):
        cache_teacher(CACHE, path, teacher, LAYERS, context)
    monkeypatch.undo()
    assert 0 < cache_teacher(CACHE, path, teacher, LAYERS, context)["num_units_computed"] < NUM_UNITS
    assert folder_bytes(path) == folder_bytes(run / "store.zarr")


def test_plan_lists_missing_units_without_writing(run, tmp_path):
    teacher, context = teacher_of(run)
    plan = plan_cache(CACHE, tmp_path / "none.zarr", teacher, LAYERS, context, trained=True)
    assert (plan["num_units"], plan["num_units_missing"]) == (NUM_UNITS, NUM_UNITS)
    assert plan["missing_bytes"] == plan["store_bytes"] == sum(one["store_bytes"] for one in plan["arrays"].values())
    assert not list(tmp_path.iterdir())
    more = dataclasses.replace(context, views=dataclasses.replace(VIEWS, num_views=4))
    plan = plan_cache(CACHE, run / "store.zarr", teacher, LAYERS, more, trained=True)
    assert (plan["num_units_missing"], plan["num_images"]) == (NUM_UNITS // 3, 300)
    assert probe(CACHE, teacher, LAYERS, context, 900)["images_per_s"] > 0
