"""Repair gives back the very bytes of the undamaged store, computes the damaged units and no others, and refuses to
guess.
"""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, TEACHER, VIEWS, StopAfter, make_tiny_store, squares, tiny_context

import kdpipe.stages.cache_teacher.repair
from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.cache import fill_store
from kdpipe.stages.cache_teacher.plan import build_cache_job
from kdpipe.stages.cache_teacher.repair import repair
from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import (
    Codec,
    FingerprintMismatch,
    LockedError,
    StoreError,
    claim,
    create_store,
    ensure_store,
    missing_units,
    open_store,
    read_samples,
    read_store_manifest,
)
from kdpipe.store.check.verify import verify_store
from kdpipe.store.format.encodings.head import HEAD_KEY
from kdpipe.store.format.markers import marker_path
from kdpipe.store.format.shard import shard_path
from kdpipe.store.format.zarr_metadata import replace_metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repaired")
    make_tiny_store(tiny_context(folder))
    return folder


@pytest.fixture(scope="module")
def intact(run):
    return folder_bytes(run / "store.zarr")


@pytest.fixture
def path(run, tmp_path):
    shutil.copytree(run / "store.zarr", tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def flip(file, at, bit=2):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def repaired(run, path, config=CACHE, layers=LAYERS, **changes):
    context = tiny_context(run, **changes)
    return repair(config, path, load_teacher(TEACHER, 0, context), layers, context)


def test_a_whole_store_is_left_alone(run, path, intact):
    stamps = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    found, left, num_computed = repaired(run, path)
    assert (found.damaged, left.damaged, num_computed) == ((), (), 0)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == stamps


def test_repair_restores_bytes_computing_only_damaged_units(run, path):
    context = tiny_context(run, views=dataclasses.replace(VIEWS, num_views=7))
    cache_teacher(CACHE, path, load_teacher(TEACHER, 0, context), LAYERS, context)
    intact = folder_bytes(path)
    manifest = read_store_manifest(path)
    logits, features = manifest.arrays
    units = manifest.layout.units()
    first, second, third, fourth, fifth = units[:5]
    untouched = [shard_path(path, features, first), shard_path(path, features, third)]
    for unit in units[5:]:
        untouched += [marker_path(path, unit), *[shard_path(path, spec, unit) for spec in manifest.arrays]]
    inodes = [file.stat().st_ino for file in untouched]
    flip(shard_path(path, logits, first), 40)
    shard_path(path, features, second).unlink()
    torn = shard_path(path, logits, third)
    os.truncate(torn, 100)
    marker_path(path, fourth).unlink()
    flip(marker_path(path, fifth), 5000)
    flip(path / "logits" / "zarr.json", 30)
    (path / "features" / "zarr.json").unlink()
    flip(path / "samples" / "labels" / "c" / "0", 17)
    found, left, num_computed = repaired(run, path)
    assert len(found.damaged) == 8
    assert left.damaged == left.missing == ()
    assert num_computed == 5
    assert folder_bytes(path) == intact
    assert [file.stat().st_ino for file in untouched] == inodes


@pytest.mark.parametrize("name", ["ids", "labels", "pixels_crc32c"])
def test_samples_come_back_from_the_data_set(run, path, intact, name):
    for damage in (lambda file: flip(file, 40), lambda file: file.unlink(), lambda file: flip(file, 8 * 700)):
        damage(path / "samples" / name / "c" / "0")
        found, left, num_computed = repaired(run, path)
        assert found.damaged
        assert not left.damaged
        assert num_computed == 0
        assert folder_bytes(path) == intact


def test_all_samples_may_be_lost(run, path, intact):
    shutil.rmtree(path / "samples")
    assert not repaired(run, path)[1].damaged
    assert folder_bytes(path) == intact


def test_lost_head_comes_back_from_the_teacher(run, path):
    context = tiny_context(run)
    teacher = load_teacher(TEACHER, 0, context)
    cache_teacher(CACHE, path, teacher, [*LAYERS, TEACHER_HEAD], context)
    intact = folder_bytes(path)
    assert np.array_equal(open_store(path).head, linear_head(teacher.model, context.image_shape))
    for damage in (lambda file: flip(file, 40), lambda file: file.unlink()):
        damage(path / HEAD_KEY)
        found, left, num_computed = repaired(run, path)
        assert [fault.key for fault in found.damaged] == [HEAD_KEY]
        assert (left.damaged, num_computed) == ((), 0)
        assert folder_bytes(path) == intact


def test_samples_of_an_extension_are_restored(run, tmp_path):
    context, path = tiny_context(run), tmp_path / "grown.zarr"
    teacher = load_teacher(TEACHER, 0, context)
    part = dataclasses.replace(
        context.train_set,
        **{name: getattr(context.train_set, name)[:200] for name in ("images", "labels", "sample_ids")},
    )
    cache_teacher(CACHE, path, teacher, LAYERS, tiny_context(run, train_set=part))
    cache_teacher(CACHE, path, teacher, LAYERS, context)
    assert len(read_store_manifest(path).layout.segments) == 2
    before = folder_bytes(path)
    row = int(read_store_manifest(path).layout.sample_rows()[-1])
    ids = path / "samples" / "ids" / "c" / "0"
    flip(ids, 8 * row)
    assert not repaired(run, path)[1].damaged
    assert folder_bytes(path) == before
    flip(ids, 8 * row)
    flip(ids, 8)
    with pytest.raises(StoreError, match="does not determine them"):
        repaired(run, path)


def test_another_data_set_cannot_give_the_samples(run, path):
    flip(path / "samples" / "labels" / "c" / "0", 17)
    with pytest.raises(FingerprintMismatch, match="split"):
        repaired(run, path, train_set=squares(300, 0, "other"))
    with pytest.raises(StoreError, match="not the one that it was made from"):
        repaired(run, path, train_set=dataclasses.replace(squares(300, 0), labels=squares(300, 0).labels.flip(0)))


def test_another_teacher_is_refused_before_anything_changes(run, path):
    flip(shard_path(path, read_store_manifest(path).arrays[0], read_store_manifest(path).layout.units()[0]), 40)
    before = folder_bytes(path)
    context = tiny_context(run)
    teacher = load_teacher(TEACHER, 0, context)
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1e-3)
    with pytest.raises(FingerprintMismatch, match="weights_sha256"):
        repair(CACHE, path, teacher, LAYERS, context)
    assert folder_bytes(path) == before


@pytest.mark.parametrize("damage", [lambda file: flip(file, 300), lambda file: file.unlink()], ids=["flipped", "gone"])
def test_lost_manifest_is_rebuilt_if_markers_agree(run, path, intact, damage):
    damage(path / "zarr.json")
    manifest = read_store_manifest(run / "store.zarr")
    flip(shard_path(path, manifest.arrays[0], manifest.layout.units()[0]), 40)
    found, left, num_computed = repaired(run, path)
    assert "zarr.json" in [fault.key for fault in found.damaged]
    assert not left.damaged
    assert num_computed == 1
    assert folder_bytes(path) == intact


def test_a_lost_manifest_is_not_guessed(run, path):
    (path / "zarr.json").unlink()
    before = folder_bytes(path)
    for changes in ({"train_set": squares(300, 5)}, {"views": dataclasses.replace(VIEWS, seed=8)}):
        with pytest.raises(StoreError, match="was not written for what this recipe plans"):
            repaired(run, path, **changes)
    with pytest.raises(StoreError, match="was not written for what this recipe plans"):
        repaired(run, path, config=dataclasses.replace(CACHE, dtype="float32"))
    with pytest.raises(StoreError, match="was not written for what this recipe plans"):
        repaired(run, path, layers=[])
    shutil.rmtree(path / "markers" / "c")
    with pytest.raises(StoreError, match="neither a manifest nor a marker"):
        repaired(run, path)
    assert {key: raw for key, raw in before.items() if not key.startswith("markers/c")} == folder_bytes(path)


def test_store_of_another_schema_is_not_repaired(run, path, intact):
    file = path / "zarr.json"
    record = json.loads(file.read_text())
    record["attributes"]["kdpipe"]["schema_version"] = 4
    file.write_text(json.dumps(record))
    assert not repaired(run, path)[1].damaged, "here the version alone was damaged"
    assert folder_bytes(path) == intact
    record["attributes"]["kdpipe"]["more"] = "of a later kdpipe"
    file.write_text(json.dumps(record))
    with pytest.raises(StoreError, match="schema 4: only the kdpipe that wrote it"):
        repaired(run, path)


def test_extension_during_the_check_is_kept(run, path, monkeypatch):
    manifest = read_store_manifest(path)
    samples = read_samples(path, manifest.layout, manifest.identity.data)
    grown = dataclasses.replace(manifest, layout=dataclasses.replace(manifest.layout, num_views=4))
    flip(path / "logits" / "zarr.json", 30)
    real = kdpipe.stages.cache_teacher.repair.verify_store

    def verify_and_grow(*args, **kwargs):
        verdict = real(*args, **kwargs)
        ensure_store(path, grown, samples)
        return verdict

    monkeypatch.setattr(kdpipe.stages.cache_teacher.repair, "verify_store", verify_and_grow)
    _, left, _ = repaired(run, path)
    assert not left.damaged
    assert read_store_manifest(path).layout.num_views == 4


def test_what_was_missing_before_stays_missing(run, path):
    manifest = read_store_manifest(path)
    grown = dataclasses.replace(manifest, layout=dataclasses.replace(manifest.layout, num_views=5))
    ensure_store(path, grown, read_samples(path, manifest.layout, manifest.identity.data))
    flip(marker_path(path, manifest.layout.units()[2]), 50)
    _, left, num_computed = repaired(run, path)
    assert num_computed == 1
    assert not left.damaged
    assert {unit.view for unit, _ in left.missing} == {3, 4}
    assert open_store(path).num_views == 3


def test_readers_that_opened_before_keep_working(run, path):
    store = open_store(path)
    before = store.array("logits").copy()
    manifest = read_store_manifest(path)
    unit = manifest.layout.units()[0]
    shard_path(path, manifest.arrays[0], unit).unlink()
    marker_path(path, unit).unlink()
    repaired(run, path)
    assert np.array_equal(store.array("logits"), before)
    assert np.array_equal(store.read_view("logits", 0), before[0])


def test_a_stopped_repair_is_finished_by_the_next(run, path, intact):
    manifest = read_store_manifest(path)
    for unit in manifest.layout.units():
        flip(shard_path(path, manifest.arrays[1], unit), 9)
    num_units = len(manifest.layout.units())
    with pytest.raises(StoppedEarly):
        repaired(run, path, monitor=RunMonitor(should_stop=StopAfter(num_units + 3)))
    assert 0 < len(missing_units(path, manifest)) <= num_units
    assert not repaired(run, path)[1].damaged
    assert folder_bytes(path) == intact


def test_claimed_unit_is_not_repaired(run, path):
    unit = read_store_manifest(path).layout.units()[0]
    flip(marker_path(path, unit), 50)
    at_it = claim(path, unit.key)
    with pytest.raises(LockedError, match="is being computed by process"):
        repaired(run, path)
    at_it.release()
    assert not repaired(run, path)[1].damaged


def packed(run, path, **changes):
    """The tiny store as an archive."""
    source = run / "store.zarr"
    manifest = dataclasses.replace(read_store_manifest(source), codec=Codec(), finished=None, **changes)
    create_store(path, manifest, read_samples(source, manifest.layout, manifest.identity.data))
    context = tiny_context(run)
    units = manifest.layout.units()
    fill_store(build_cache_job(CACHE, path, manifest, load_teacher(TEACHER, 0, context), context), units)
    return manifest


def test_an_archive_is_repaired_too_unless_it_was_rounded(run, tmp_path):
    path = tmp_path / "packed.zarr"
    manifest = packed(run, path)
    before = folder_bytes(path)
    shard_path(path, manifest.arrays[0], manifest.layout.units()[1]).unlink()
    assert repaired(run, path)[2] == 1
    assert folder_bytes(path) == before
    replace_metadata(path, dataclasses.replace(read_store_manifest(path), rounded={"logits": 6}))
    shard_path(path, manifest.arrays[0], manifest.layout.units()[1]).unlink()
    with pytest.raises(RunError, match="rounded logits"):
        repaired(run, path)
    assert verify_store(path).damaged
