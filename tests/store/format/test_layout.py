"""Units cover every row once, and shards are page-aligned, for any rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.store import ArraySpec, StoreLayout, rows_per_unit
from kdpipe.store.format.layout import ANY_ROW_PAGES, CHUNK_BYTES, PAGE_BYTES, rows_per_chunk
from kdpipe.store.format.shard import shard_shape

specs = st.lists(
    st.builds(
        ArraySpec,
        name=st.just("logits"),
        row_shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
        dtype=st.sampled_from(["float16", "float32"]),
    ),
    min_size=1,
    max_size=3,
)


@given(specs, st.integers(1, 100_000), st.integers(4096, 2**28))
def test_shards_are_whole_pages_and_whole_chunks(arrays, num_samples, shard_bytes):
    rows = rows_per_unit(arrays, num_samples, shard_bytes)
    for spec in arrays:
        assert rows * spec.row_bytes % PAGE_BYTES == 0
        chunk = rows_per_chunk(spec, rows)
        assert rows % chunk == 0
        assert chunk == 1 or chunk * spec.row_bytes <= CHUNK_BYTES
        assert shard_shape(spec, rows).data_bytes(rows) == rows * spec.row_bytes


@given(specs, st.integers(1, 100_000), st.integers(4096, 2**28))
def test_shards_are_near_target_size_and_within_data_set(arrays, num_samples, shard_bytes):
    rows = rows_per_unit(arrays, num_samples, shard_bytes)
    widest = max(spec.row_bytes for spec in arrays)
    smallest = rows_per_unit(arrays, num_samples, 1)
    assert rows == smallest or rows * widest <= shard_bytes
    assert rows < num_samples + max(smallest, ANY_ROW_PAGES * PAGE_BYTES)


segments = st.lists(st.integers(1, 1500), min_size=1, max_size=4).map(tuple)


@given(st.integers(1, 4), segments, st.integers(1, 500))
def test_units_cover_each_sample_once_and_start_each_segment(num_views, counts, unit_rows):
    layout = StoreLayout(num_views, unit_rows, counts)
    for view in range(num_views):
        units = layout.units([view])
        covered = [row for unit in units for row in range(unit.start, unit.stop)]
        assert covered == layout.sample_rows().tolist()
        assert [unit.shard for unit in units] == list(range(layout.num_shards))
        assert all(unit.start == unit.shard * unit_rows and 0 < unit.num_rows <= unit_rows for unit in units)
    assert len(layout.sample_rows()) == sum(counts)
    assert layout.num_rows == units[-1].stop
    of_segment = np.bincount([layout.segment_of(unit.shard) for unit in units], weights=[u.num_rows for u in units])
    assert of_segment.tolist() == list(counts)


@given(segments, st.integers(1, 500), st.integers(1, 1500))
def test_a_further_segment_moves_no_row(counts, unit_rows, added):
    before, after = StoreLayout(1, unit_rows, counts), StoreLayout(1, unit_rows, (*counts, added))
    assert after.sample_rows()[: before.num_samples].tolist() == before.sample_rows().tolist()
    assert after.units()[: before.num_shards] == before.units()
