"""Guarantees of any store, whatever its logits, its profile, and how its rows are read."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.many_stores import LOGITS, Wish, first_difference, grow, truth

import kdpipe.store.read.mapped_views
from kdpipe.store import ArraySpec, Codec, StoreError, TargetStore, open_store
from kdpipe.store.read.mmap_files import MappingUnsupported

STREAM_BYTES = 20_000
"""Less than two shards."""

RESIDENCES = {
    "mapped": "one address range",
    "not mapped": "the system grants no address range",
    "rows not in pages": "inside a page",
    "streamed": "streamed within 20,000 bytes",
    "zstd": "archive profile",
    "blosc": "archive profile",
    "pickled": "one address range",
    "grown": "one address range",
}
"""How a store is read, with a part of the reason that it gives for its way of reading."""

KINDS = [f"{residence}, {logits}" for residence in RESIDENCES for logits in LOGITS]


@dataclass(frozen=True)
class Reader:
    store: TargetStore
    why: str

    @property
    def ids(self):
        return self.store.samples.ids

    def truth(self, spec: ArraySpec, view: int, ids):
        return truth(spec, view, np.asarray(ids, np.int64))


def build(folder: Path, residence: str, logits: str) -> Path:
    wish, path = Wish(LOGITS[logits]), folder / f"{residence}-{logits}.zarr".replace(" ", "-")
    if residence in ("zstd", "blosc"):
        return grow(path, replace(wish, form=replace(wish.form, codec=Codec(residence, 3))))
    if residence == "rows not in pages":
        return grow(path, replace(wish, form=replace(wish.form, unit_rows=331)))
    if residence == "grown":
        first = replace(wish, num_views=1, num_samples=600, num_layers=0)
        return grow(path, first, replace(first, num_views=2), replace(wish, num_samples=601), wish)
    return grow(path, wish)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> Callable[[str, str], Path]:
    """Paths of stores, each made once."""
    folder = tmp_path_factory.mktemp("stores")
    return cache(lambda residence, logits: build(folder, residence, logits))


def hold(path: Path, residence: str) -> TargetStore:
    reader = open_store(path)
    if residence == "streamed":
        return reader.streamed(STREAM_BYTES)
    if residence == "pickled":
        assert reader.gather("features/layer2.0", 0, reader.samples.ids[:2]).shape == (2, 2, 3, 3)
        return pickle.loads(pickle.dumps(reader))
    return reader


@pytest.fixture(params=KINDS)
def reader(request, paths, monkeypatch) -> Reader:
    residence, logits = request.param.split(", ")
    if residence == "not mapped":
        refuse_maps(monkeypatch)
    return Reader(hold(paths(residence, logits), residence), RESIDENCES[residence])


def refuse_maps(monkeypatch):
    def refused(*_):
        raise MappingUnsupported("the system grants no address range of 1 bytes")

    monkeypatch.setattr(kdpipe.store.read.mapped_views, "map_files", refused)


def arrays_and_views(reader):
    return [(spec, view) for spec in reader.store.arrays for view in range(reader.store.num_views)]


def test_store_holds_expected_rows(reader):
    assert reader.store.num_views == 2
    assert reader.store.num_samples == 1300
    assert reader.store.layers[-1] == "layer2.0"
    assert len(np.unique(reader.ids)) == 1300


def test_a_batch_is_gathered_by_id_in_the_order_of_its_ids(reader):
    rng = np.random.default_rng(1)
    for spec, view in arrays_and_views(reader):
        for size in (1, 2, 256, len(reader.ids)):
            ids = rng.permutation(reader.ids)[:size]
            got = reader.store.gather(spec.name, view, ids)
            assert got.dtype == spec.dtype
            assert got.shape == (size, *spec.row_shape)
            assert np.array_equal(got, reader.truth(spec, view, ids))


def test_batch_may_repeat_samples(reader):
    ids = reader.ids[[5, 5, 1299, 5, 700, 1299]]
    for spec, view in arrays_and_views(reader):
        assert np.array_equal(reader.store.gather(spec.name, view, ids), reader.truth(spec, view, ids))


def test_every_single_sample_is_found_on_its_own(reader):
    spec = reader.store.arrays[0]
    expected = reader.truth(spec, 1, reader.ids)
    for at in range(0, len(reader.ids), 13):
        assert np.array_equal(reader.store.gather(spec.name, 1, reader.ids[at : at + 1])[0], expected[at])
    smallest = np.array([reader.ids.min(), reader.ids.max()])
    assert np.array_equal(reader.store.gather(spec.name, 0, smallest), reader.truth(spec, 0, smallest))


def test_an_empty_batch_is_empty(reader):
    for spec, view in arrays_and_views(reader):
        got = reader.store.gather(spec.name, view, np.empty(0, np.int64))
        assert got.shape == (0, *spec.row_shape)
        assert got.dtype == spec.dtype


@pytest.mark.parametrize("warm", [False, True])
def test_an_absent_id_is_named(reader, warm):
    if warm:
        reader.store.gather("features/layer2.0", 1, reader.ids)
    between = next(number for number in range(5000) if number not in reader.ids)
    above = int(reader.ids.max()) + 1
    first, second = reader.ids[:2].tolist()
    for absent in (-1, -2, -(2**62), -(2**63), 2**62, 2**63 - 2, 2**63 - 1, between, above):
        for ids in ([absent], [first, absent, second]):
            output = rf"no targets for 1 of the {len(ids)} samples, for example ids \[{absent}\]"
            with pytest.raises(StoreError, match=output):
                reader.store.gather("features/layer2.0", 1, np.array(ids))
        with pytest.raises(StoreError, match="no targets for 5 of the 5 samples"):
            reader.store.rows_of(np.full(5, absent))


@pytest.mark.parametrize("view", [-1, 2, 10**9])
def test_an_absent_view_is_named(reader, view):
    reader.store.gather("features/layer2.0", 1, reader.ids[:3])
    for ask in (
        lambda: reader.store.gather("features/layer2.0", view, reader.ids[:3]),
        lambda: reader.store.gather("features/layer2.0", view, reader.ids[:0]),
        lambda: reader.store.take("features/layer2.0", view, np.arange(3)),
        lambda: reader.store.read_view("features/layer2.0", view),
        lambda: reader.store.units(view),
    ):
        with pytest.raises(StoreError, match=f"has views 0 to 1, not {view}"):
            ask()


def test_an_absent_array_is_named_with_those_that_are_there(reader):
    for ask in (
        lambda name: reader.store.gather(name, 0, reader.ids[:3]),
        lambda name: reader.store.read_view(name, 0),
        lambda name: reader.store.read_unit(name, reader.store.units(0)[0]),
        reader.store.array,
        reader.store.read_mode,
    ):
        with pytest.raises(StoreError, match=r"no array 'features/layer9', only .*features/layer2\.0"):
            ask("features/layer9")


def test_whole_views_and_units_read_back_row_by_row(reader):
    rows = reader.store.rows_of(reader.ids)
    for spec, view in arrays_and_views(reader):
        expected = reader.truth(spec, view, reader.ids)
        whole = reader.store.read_view(spec.name, view)
        assert np.array_equal(whole[rows], expected)
        assert np.array_equal(reader.store.take(spec.name, view, rows[::-1]), expected[::-1])
        given = np.empty_like(whole)
        assert reader.store.read_view(spec.name, view, out=given) is given
        assert given.tobytes() == whole.tobytes()
        joined = [reader.store.read_unit(spec.name, unit) for unit in reader.store.units(view)]
        assert np.array_equal(np.concatenate(joined), expected)


def test_rows_without_a_sample_have_the_fill_value(reader):
    empty = np.ones(reader.store.num_rows, bool)
    empty[reader.store.rows_of(reader.ids)] = False
    assert empty.any() == (reader.store.num_rows > reader.store.num_samples)
    for spec, view in arrays_and_views(reader):
        nothing = reader.store.read_view(spec.name, view)[empty]
        assert np.array_equal(nothing, np.full_like(nothing, spec.fill_value), equal_nan=spec.dtype.startswith("float"))


def test_whole_array_is_read_only_or_refused_with_reason(reader):
    rows = reader.store.rows_of(reader.ids)
    for spec in reader.store.arrays:
        if reader.store.read_mode(spec.name).mode == "memory":
            with pytest.raises(
                StoreError, match=f"{spec.name} cannot be mapped, because .*{reader.why}.*Use read_view"
            ):
                reader.store.array(spec.name)
            continue
        whole = reader.store.array(spec.name)
        assert whole.shape == (2, reader.store.num_rows, *spec.row_shape)
        assert np.array_equal(whole[1, rows], reader.truth(spec, 1, reader.ids))
        assert not whole.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            whole[0, 0] = 0


def test_returned_rows_are_writable_copies(reader):
    ids = reader.ids[:4]
    for spec, view in arrays_and_views(reader):
        reader.store.gather(spec.name, view, ids)[:] = 1
        reader.store.read_view(spec.name, view)[:] = 1
        assert np.array_equal(reader.store.gather(spec.name, view, ids), reader.truth(spec, view, ids))


def test_read_mode_is_reported_with_reason(reader):
    for spec in reader.store.arrays:
        reading = reader.store.read_mode(spec.name)
        assert reading.mode == ("mapped" if reader.why == "one address range" else "memory")
        assert reader.why in reading.reason
        assert reader.store.read_mode(spec.name) == reading


def test_plain_zarr_reads_the_same_numbers(reader):
    rows = reader.store.rows_of(reader.ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(reader.store.path, mode="r")
        for spec in reader.store.arrays:
            assert group[spec.name].shape == (2, reader.store.num_rows, *spec.row_shape)
            for view in range(2):
                assert np.array_equal(group[spec.name][view][rows], reader.truth(spec, view, reader.ids))
        assert np.array_equal(group["samples/ids"][:][rows], reader.ids)


def test_streaming_holds_no_more_than_it_may(paths):
    reader = open_store(paths("mapped", "float32")).streamed(STREAM_BYTES)
    name = "features/layer2.0"
    shard_bytes = reader.unit_rows * reader.spec(name).row_bytes
    for view in (0, 1, 0):
        assert len(reader.gather(name, view, reader.samples.ids)) == 1300
        assert reader._cache.num_bytes <= max(STREAM_BYTES, shard_bytes)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_their_parent_reads(paths, method):
    """Some stores have been read before, as in a loader's second epoch."""
    stores = [hold(paths(residence, logits), residence) for residence in RESIDENCES for logits in LOGITS]
    for number, one in enumerate(stores):
        if number % 2:
            one.gather("features/layer2.0", 0, one.samples.ids)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(first_difference, stores, chunksize=4)
    assert found == [None] * len(stores)
