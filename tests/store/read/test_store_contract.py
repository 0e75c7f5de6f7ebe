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

import kdpipe.store.read.target_store
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
"""How a store is held, with a part of the reason that it gives for its way of reading."""

KINDS = [f"{residence}, {logits}" for residence in RESIDENCES for logits in LOGITS]


@dataclass(frozen=True)
class Held:
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
    held = open_store(path)
    if residence == "streamed":
        return held.streamed(STREAM_BYTES)
    if residence == "pickled":
        assert held.gather("features/layer2.0", 0, held.samples.ids[:2]).shape == (2, 2, 3, 3)
        return pickle.loads(pickle.dumps(held))
    return held


@pytest.fixture(params=KINDS)
def held(request, paths, monkeypatch) -> Held:
    residence, logits = request.param.split(", ")
    if residence == "not mapped":
        refuse_maps(monkeypatch)
    return Held(hold(paths(residence, logits), residence), RESIDENCES[residence])


def refuse_maps(monkeypatch):
    def refused(*_):
        raise MappingUnsupported("the system grants no address range of 1 bytes")

    monkeypatch.setattr(kdpipe.store.read.target_store, "map_files", refused)


def arrays_and_views(held):
    return [(spec, view) for spec in held.store.arrays for view in range(held.store.num_views)]


def test_store_holds_expected_rows(held):
    assert held.store.num_views == 2
    assert held.store.num_samples == 1300
    assert held.store.layers == ("layer2.0",)
    assert len(np.unique(held.ids)) == 1300


def test_a_batch_is_gathered_by_id_in_the_order_of_its_ids(held):
    rng = np.random.default_rng(1)
    for spec, view in arrays_and_views(held):
        for size in (1, 2, 256, len(held.ids)):
            ids = rng.permutation(held.ids)[:size]
            got = held.store.gather(spec.name, view, ids)
            assert got.dtype == spec.dtype
            assert got.shape == (size, *spec.row_shape)
            assert np.array_equal(got, held.truth(spec, view, ids))


def test_batch_may_repeat_samples(held):
    ids = held.ids[[5, 5, 1299, 5, 700, 1299]]
    for spec, view in arrays_and_views(held):
        assert np.array_equal(held.store.gather(spec.name, view, ids), held.truth(spec, view, ids))


def test_every_single_sample_is_found_on_its_own(held):
    spec = held.store.arrays[0]
    expected = held.truth(spec, 1, held.ids)
    for at in range(0, len(held.ids), 13):
        assert np.array_equal(held.store.gather(spec.name, 1, held.ids[at : at + 1])[0], expected[at])
    smallest = np.array([held.ids.min(), held.ids.max()])
    assert np.array_equal(held.store.gather(spec.name, 0, smallest), held.truth(spec, 0, smallest))


def test_an_empty_batch_is_empty(held):
    for spec, view in arrays_and_views(held):
        got = held.store.gather(spec.name, view, np.empty(0, np.int64))
        assert got.shape == (0, *spec.row_shape)
        assert got.dtype == spec.dtype


@pytest.mark.parametrize("warm", [False, True])
def test_an_absent_id_is_named(held, warm):
    if warm:
        held.store.gather("features/layer2.0", 1, held.ids)
    between = next(number for number in range(5000) if number not in held.ids)
    above = int(held.ids.max()) + 1
    first, second = held.ids[:2].tolist()
    for absent in (-1, -2, -(2**62), -(2**63), 2**62, 2**63 - 2, 2**63 - 1, between, above):
        for ids in ([absent], [first, absent, second]):
            said = rf"no targets for 1 of the {len(ids)} samples, for example ids \[{absent}\]"
            with pytest.raises(StoreError, match=said):
                held.store.gather("features/layer2.0", 1, np.array(ids))
        with pytest.raises(StoreError, match="no targets for 5 of the 5 samples"):
            held.store.rows_of(np.full(5, absent))


@pytest.mark.parametrize("view", [-1, 2, 10**9])
def test_an_absent_view_is_named(held, view):
    held.store.gather("features/layer2.0", 1, held.ids[:3])
    for ask in (
        lambda: held.store.gather("features/layer2.0", view, held.ids[:3]),
        lambda: held.store.gather("features/layer2.0", view, held.ids[:0]),
        lambda: held.store.take("features/layer2.0", view, np.arange(3)),
        lambda: held.store.read_view("features/layer2.0", view),
        lambda: held.store.units(view),
    ):
        with pytest.raises(StoreError, match=f"has views 0 to 1, not {view}"):
            ask()


def test_an_absent_array_is_named_with_those_that_are_there(held):
    for ask in (
        lambda name: held.store.gather(name, 0, held.ids[:3]),
        lambda name: held.store.read_view(name, 0),
        lambda name: held.store.read_unit(name, held.store.units(0)[0]),
        held.store.array,
        held.store.read_mode,
    ):
        with pytest.raises(StoreError, match=r"no array 'features/layer9', only .*features/layer2\.0"):
            ask("features/layer9")


def test_whole_views_and_units_read_back_row_by_row(held):
    rows = held.store.rows_of(held.ids)
    for spec, view in arrays_and_views(held):
        expected = held.truth(spec, view, held.ids)
        whole = held.store.read_view(spec.name, view)
        assert np.array_equal(whole[rows], expected)
        assert np.array_equal(held.store.take(spec.name, view, rows[::-1]), expected[::-1])
        given = np.empty_like(whole)
        assert held.store.read_view(spec.name, view, out=given) is given
        assert given.tobytes() == whole.tobytes()
        joined = [held.store.read_unit(spec.name, unit) for unit in held.store.units(view)]
        assert np.array_equal(np.concatenate(joined), expected)


def test_rows_without_a_sample_have_the_fill_value(held):
    empty = np.ones(held.store.num_rows, bool)
    empty[held.store.rows_of(held.ids)] = False
    assert empty.any() == (held.store.num_rows > held.store.num_samples)
    for spec, view in arrays_and_views(held):
        nothing = held.store.read_view(spec.name, view)[empty]
        assert np.array_equal(nothing, np.full_like(nothing, spec.fill_value), equal_nan=spec.dtype.startswith("float"))


def test_whole_array_is_read_only_or_refused_with_reason(held):
    rows = held.store.rows_of(held.ids)
    for spec in held.store.arrays:
        if held.store.read_mode(spec.name).mode == "memory":
            with pytest.raises(StoreError, match=f"{spec.name} cannot be mapped, because .*{held.why}.*Use read_view"):
                held.store.array(spec.name)
            continue
        whole = held.store.array(spec.name)
        assert whole.shape == (2, held.store.num_rows, *spec.row_shape)
        assert np.array_equal(whole[1, rows], held.truth(spec, 1, held.ids))
        assert not whole.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            whole[0, 0] = 0


def test_returned_rows_are_writable_copies(held):
    ids = held.ids[:4]
    for spec, view in arrays_and_views(held):
        held.store.gather(spec.name, view, ids)[:] = 1
        held.store.read_view(spec.name, view)[:] = 1
        assert np.array_equal(held.store.gather(spec.name, view, ids), held.truth(spec, view, ids))


def test_read_mode_is_reported_with_reason(held):
    for spec in held.store.arrays:
        reading = held.store.read_mode(spec.name)
        assert reading.mode == ("mapped" if held.why == "one address range" else "memory")
        assert held.why in reading.reason
        assert held.store.read_mode(spec.name) == reading


def test_plain_zarr_reads_the_same_numbers(held):
    rows = held.store.rows_of(held.ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(held.store.path, mode="r")
        for spec in held.store.arrays:
            assert group[spec.name].shape == (2, held.store.num_rows, *spec.row_shape)
            for view in range(2):
                assert np.array_equal(group[spec.name][view][rows], held.truth(spec, view, held.ids))
        assert np.array_equal(group["samples/ids"][:][rows], held.ids)


def test_streaming_holds_no_more_than_it_may(paths):
    held = open_store(paths("mapped", "float32")).streamed(STREAM_BYTES)
    name = "features/layer2.0"
    shard_bytes = held.unit_rows * held.spec(name).row_bytes
    for view in (0, 1, 0):
        assert len(held.gather(name, view, held.samples.ids)) == 1300
        assert held._cache.num_bytes <= max(STREAM_BYTES, shard_bytes)


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
