"""Units cover every row once, and shards line up with pages, whatever the rows are."""

from hypothesis import given
from hypothesis import strategies as st

from store import ArraySpec, all_units, rows_per_unit
from store.geometry import CHUNK_BYTES, PAGE_BYTES, rows_per_chunk
from store.shard import shard_shape

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
def test_shards_come_near_the_wanted_size_and_no_larger_than_the_set(arrays, num_samples, shard_bytes):
    rows = rows_per_unit(arrays, num_samples, shard_bytes)
    widest = max(spec.row_bytes for spec in arrays)
    smallest = rows_per_unit(arrays, num_samples, 1)
    assert rows == smallest or rows * widest <= shard_bytes
    assert rows < num_samples + smallest


@given(st.integers(1, 4), st.integers(1, 3000), st.integers(1, 500))
def test_units_cover_every_row_once(num_views, num_samples, unit_rows):
    units = all_units(num_views, num_samples, unit_rows)
    for view in range(num_views):
        covered = [row for unit in units if unit.view == view for row in range(unit.start, unit.stop)]
        assert covered == list(range(num_samples))
    assert all(unit.start == unit.shard * unit_rows and 0 < unit.num_rows <= unit_rows for unit in units)
