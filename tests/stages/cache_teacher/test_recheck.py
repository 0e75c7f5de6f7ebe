"""Tests of comparing stored rows with the teacher: forged rows are detected despite valid checksums."""

import dataclasses

import numpy as np
import pytest
import torch
from support.tiny_run import CACHE, LAYERS, TEACHER, make_tiny_store, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import FingerprintMismatch, StoreError, finish_store, open_store, write_unit
from kdpipe.store.check.verify import verify_store
from kdpipe.store.format.markers import marker_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recomputed")
    make_tiny_store(tiny_context(folder))
    return folder


@pytest.fixture
def teacher(run):
    return load_teacher(TEACHER, 0, tiny_context(run))


def forge(path, array, change):
    """Write one unit again, with other numbers in `array` and checksums that fit them."""
    store = open_store(path)
    unit = store.units(1)[0]
    rows = {spec.name: store.read_unit(spec.name, unit).astype(spec.dtype) for spec in store.arrays}
    rows[array] = change(rows[array].copy()).astype(rows[array].dtype)
    marker_path(path, unit).unlink()
    write_unit(path, store.manifest, unit, rows)
    finish_store(path)
    assert not verify_store(path).damaged
    return unit


@pytest.mark.parametrize("config", [CACHE, dataclasses.replace(CACHE, top_k=2)], ids=["dense", "top-k"])
def test_recomputed_rows_match_the_store(run, teacher, tmp_path, config):
    context = tiny_context(run)
    cache_teacher(config, tmp_path / "a.zarr", teacher, LAYERS, context)
    compared = recompute(tmp_path / "a.zarr", teacher, context, 10_000, 0)
    assert compared.num_rows == 300
    assert compared.differing == ()
    assert 0 < compared.largest_error < 0.3, "the tolerance should be well above what rounding takes"


def test_rows_of_another_teacher_are_detected(run, teacher, tmp_path):
    context, path = tiny_context(run), tmp_path / "a.zarr"
    cache_teacher(CACHE, path, teacher, LAYERS, context)
    other = load_teacher(TEACHER, 0, context)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    with pytest.raises(FingerprintMismatch, match=r"teacher.weights_sha256: stored"):
        recompute(path, other, context, 5, 0)
    identity = teacher.identity

    class Pretender(type(other)):
        identity = teacher.identity

    pretender = Pretender(other.model, other.architecture, other.normalize)
    assert pretender.identity == identity
    compared = recompute(path, pretender, context, 20, 0)
    assert {one.array for one in compared.differing} == {"logits", "features/stage2"}
    assert len({one.sample_id for one in compared.differing}) > 15


@pytest.mark.parametrize("array", ["logits", "features/stage2"])
def test_single_forged_row_is_named(run, teacher, tmp_path, array):
    context, path = tiny_context(run), tmp_path / "a.zarr"
    cache_teacher(CACHE, path, teacher, LAYERS, context)

    def change(rows):
        rows[7] = rows[7][::-1]
        return rows

    unit = forge(path, array, change)
    forged = int(open_store(path).samples.ids[unit.start + 7])
    found = [one for seed in range(6) for one in recompute(path, teacher, context, 300, seed).differing]
    assert found, "300 samples in one of 3 views each, six times over, meet every row but once in ten"
    assert {(one.sample_id, one.view, one.array) for one in found} == {(forged, 1, array)}
    assert found[0].error > 1


ENCODED = [
    ({"top_k": 2}, "logits/packed"),
    ({"encoding": "int8"}, "logits/packed"),
    ({"encoding": "int4"}, "logits/packed"),
    ({"sampled_labels": 2}, "logits/packed"),
    ({"feature_dtype": "int8"}, "range/stage2"),
]


@pytest.mark.parametrize(("encoding", "array"), ENCODED)
def test_forged_encoded_logits_are_detected(run, teacher, tmp_path, encoding, array):
    context, path = tiny_context(run), tmp_path / "a.zarr"
    cache_teacher(dataclasses.replace(CACHE, **encoding), path, teacher, LAYERS, context)
    assert not recompute(path, teacher, context, 300, 0).differing
    forge(path, array, lambda rows: rows[:, ::-1])
    differing = recompute(path, teacher, context, 300, 0).differing
    assert array.replace("range", "features") in {one.array for one in differing}
    assert {one.view for one in differing} == {1}


def test_seed_determines_the_compared_samples(run, teacher):
    context, path = tiny_context(run), run / "store.zarr"
    assert recompute(path, teacher, context, 9, 3) == recompute(path, teacher, context, 9, 3)
    assert (
        recompute(path, teacher, context, 9, 3).largest_error != recompute(path, teacher, context, 9, 4).largest_error
    )


def test_another_data_set_is_an_error(run, teacher):
    context = tiny_context(run, train_set=squares(40, 9))
    assert not np.isin(open_store(run / "store.zarr").samples.ids, context.train_set.sample_ids.numpy()).all()
    with pytest.raises(StoreError, match="has samples that are not in this recipe's data set"):
        recompute(run / "store.zarr", teacher, context, 50, 0)
