"""A store reads back what was written, by kdpipe and by plain zarr; a batch is joined by id."""

import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdpipe.store import (
    ArraySpec,
    Identity,
    Manifest,
    Samples,
    StoreError,
    StoreLayout,
    create_store,
    finish_store,
    open_store,
    write_unit,
)
from kdpipe.store.format.shard import shard_path


def test_plain_zarr_reads_the_same_numbers(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(made.path, mode="r")
        assert {name for name, _ in group.members(max_depth=None)} >= {"logits", "features/layer2.0", "samples/ids"}
        for name, expected in made.contents.items():
            assert np.array_equal(group[name][:], expected)
        assert np.array_equal(group["samples/labels"][:], made.samples.labels)


def test_views_and_batches_read_back(made):
    store = open_store(made.path)
    rng = np.random.default_rng(0)
    for name, expected in made.contents.items():
        for view in range(store.num_views):
            assert np.array_equal(store.read_view(name, view), expected[view])
            rows = rng.integers(0, store.num_samples, 300)
            assert np.array_equal(store.take(name, view, rows), expected[view][rows])
            one_shard = np.arange(5)
            assert np.array_equal(store.take(name, view, one_shard), expected[view][:5])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_samples=st.integers(1, 300), dtype=st.sampled_from(["float16", "float32"]))
def test_any_row_shape_round_trips_through_plain_zarr(tmp_path_factory, data, num_samples, dtype):
    row_shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    finite = st.floats(width=16 if dtype == "float16" else 32, allow_nan=False, allow_infinity=False)
    rows = data.draw(arrays.arrays(dtype, (num_samples, *row_shape), elements=finite))
    samples = Samples(np.arange(num_samples), np.zeros(num_samples, np.int64), np.zeros(num_samples, np.uint32))
    specs = (ArraySpec("logits", row_shape, dtype),)
    manifest = Manifest(Identity({}, samples.digests(), {}), specs, StoreLayout(1, 4096, (num_samples,)), {})
    path = tmp_path_factory.mktemp("any") / "s.zarr"
    create_store(path, manifest, samples)
    for unit in manifest.layout.units():
        write_unit(path, manifest, unit, {"logits": rows[unit.start : unit.stop]})
    finish_store(path)
    assert zarr.open_group(path, mode="r")["logits"][0].tobytes() == rows.tobytes()
    assert open_store(path).read_view("logits", 0).tobytes() == rows.tobytes()


def test_samples_are_found_by_id_in_any_order(made):
    store = open_store(made.path)
    rows = np.random.default_rng(1).permutation(store.num_samples)[:400]
    assert np.array_equal(store.rows_of(made.samples.ids[rows]), rows)
    gathered = store.gather("logits", 1, made.samples.ids[rows])
    assert np.array_equal(gathered, made.contents["logits"][1][rows])


def test_a_sample_without_targets_is_named(made):
    absent = int(made.samples.ids.max()) + 1
    with pytest.raises(StoreError, match=rf"no targets for 1 of the 2 samples, for example ids \[{absent}\]"):
        open_store(made.path).rows_of(np.array([made.samples.ids[0], absent]))


def test_an_absent_array_or_view_is_named(made):
    store = open_store(made.path)
    with pytest.raises(StoreError, match=r"no array 'features/layer9'.*logits, features/layer2.0"):
        store.read_view("features/layer9", 0)
    with pytest.raises(StoreError, match="views 0 to 1, not 2"):
        store.read_view("logits", 2)


def flip(made, view: int) -> Path:
    """Flip a bit in a row of the first shard of a view of the logits."""
    file = shard_path(made.path, made.manifest.spec("logits"), next(u for u in made.units if u.view == view))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 4
    file.write_bytes(raw)
    return file


def test_a_flipped_bit_in_a_mapped_shard_is_found_at_first_use(store_maker):
    made = store_maker()
    file, ids = flip(made, view=1), made.samples.ids[-3:]
    for store in (open_store(made.path), pickle.loads(pickle.dumps(open_store(made.path)))):
        assert np.array_equal(store.gather("logits", 0, ids), made.contents["logits"][0][-3:])
        for read in (lambda s: s.gather("logits", 1, ids), lambda s: s.take("logits", 1, s.rows_of(ids))):
            with pytest.raises(StoreError, match=f"{file} .*its bytes are not those"):
                read(store)
        with pytest.raises(StoreError, match=str(file)):
            store.array("logits")
    unchecked = open_store(made.path).verifying("never")
    assert np.array_equal(unchecked.gather("logits", 1, ids), made.contents["logits"][1][-3:])


@pytest.mark.parametrize(("verify", "is_found"), [("first", False), ("always", True)])
def test_damage_after_the_first_use_is_found_where_asked(store_maker, verify, is_found):
    made = store_maker()
    store, rows = open_store(made.path).verifying(verify), np.arange(3)
    for view in (0, 1):
        store.take("logits", view, rows)
    flip(made, view=0)
    store.take("logits", 1, rows)
    with pytest.raises(StoreError, match="is damaged") if is_found else nullcontext():
        store.take("logits", 0, rows)


def test_a_store_survives_pickling_for_worker_processes(made):
    store = open_store(made.path)
    store.take("logits", 0, np.arange(3))
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.take("logits", 1, np.arange(9)), made.contents["logits"][1][:9])
