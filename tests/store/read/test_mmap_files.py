"""Files mapped contiguously read as one array; where that fails, nothing stays mapped."""

import gc
import mmap
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

from kdpipe.store import StoreError
from kdpipe.store.read.mmap_files import FileRegion, MappingUnsupported, map_files

PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.byteorder != "little", reason="one address range needs little-endian Linux"
)


@pytest.fixture
def shards(tmp_path):
    """Three files with a tail each, like shards with an index, of which 2 pages, 1 page and 100 bytes are rows."""
    rng = np.random.default_rng(5)
    sizes = [2 * PAGE, PAGE, 100]
    contents = [rng.bytes(size) for size in sizes]
    paths = [tmp_path / str(number) for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content + b"\xff" * 20)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [FileRegion(*one) for one in zip(paths, starts, sizes, strict=True)], b"".join(contents)


def maps_of(folder: Path) -> int:
    """Return the number of maps of files in `folder` in this process."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def num_maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_files_read_as_one_read_only_array(shards):
    regions, expected = shards
    array = map_files(regions, len(expected))
    assert array.dtype == np.uint8
    assert array.shape == (len(expected),)
    assert array.tobytes() == expected
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_rows_that_straddle_two_files_are_whole(shards):
    regions, expected = shards
    whole = len(expected) // 100
    rows = map_files(regions, len(expected))[: whole * 100].reshape(whole, 100)
    order = np.random.default_rng(6).permutation(whole)
    assert 2 * PAGE % 100, "no row straddles two files"
    assert rows.take(order, axis=0).tobytes() == b"".join(expected[row * 100 : row * 100 + 100] for row in order)


def test_bytes_that_no_piece_covers_are_zeros(shards):
    regions, expected = shards
    array = map_files([regions[1]], 5 * PAGE)
    assert array[2 * PAGE : 3 * PAGE].tobytes() == expected[2 * PAGE : 3 * PAGE]
    assert not array[: 2 * PAGE].any()
    assert not array[3 * PAGE :].any()


def test_empty_ranges_and_empty_regions(shards):
    regions, expected = shards
    empty = map_files([FileRegion(regions[0].path, 0, 0)], 0)
    assert empty.shape == (0,)
    assert not empty.flags.writeable
    assert not map_files([], 3).any()
    assert map_files([*regions, FileRegion(regions[0].path, PAGE, 0)], len(expected)).tobytes() == expected


def test_file_replaced_or_deleted_after_mapping_keeps_its_bytes(shards, tmp_path):
    regions, expected = shards
    array = map_files(regions, len(expected))
    (tmp_path / "new").write_bytes(b"\0" * 3 * PAGE)
    (tmp_path / "new").replace(regions[0].path)
    regions[1].path.unlink()
    assert array.tobytes() == expected


def test_the_maps_live_as_long_as_the_last_view_and_no_longer(shards, tmp_path):
    regions, expected = shards
    assert maps_of(tmp_path) == 0
    array = map_files(regions, len(expected))
    assert maps_of(tmp_path) == len(regions)
    last = array[PAGE:].view("<f4").reshape(-1, 1)[5:]
    del array
    gc.collect()
    assert last.tobytes() == expected[PAGE + 20 :]
    del last
    assert maps_of(tmp_path) == 0


def test_repeated_mapping_leaks_no_maps_or_descriptors(shards, tmp_path):
    regions, expected = shards
    map_files(regions, len(expected))
    before, descriptors = num_maps(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(300):
        map_files(regions, len(expected))
    assert maps_of(tmp_path) == 0
    assert num_maps() < before + 100
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_forked_child_reads_the_same(shards):
    regions, expected = shards
    array = map_files(regions, len(expected))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send_bytes(array.tobytes()))
    child.start()
    assert receiver.poll(30), "the child did not answer"
    assert receiver.recv_bytes() == expected
    child.join()
    assert child.exitcode == 0
    assert array.tobytes() == expected, "the child's end took the parent's maps"


def test_short_or_absent_file_is_named_and_nothing_stays_mapped(shards, tmp_path):
    regions, expected = shards
    regions[2].path.write_bytes(b"x" * 99)
    before = num_maps()
    with pytest.raises(
        StoreError, match=rf"{regions[2].path} is damaged: it has 99 bytes, its rows take 100"
    ) as caught:
        map_files(regions, len(expected))
    assert maps_of(tmp_path) == 0
    assert num_maps() <= before + 1
    assert caught.tb is not None
    regions[2].path.unlink()
    with pytest.raises(StoreError, match=f"{regions[2].path} cannot be read: No such file"):
        map_files(regions, len(expected))


@pytest.mark.parametrize(("at", "num_bytes"), [(0, PAGE + 1), (PAGE, 1), (-PAGE, PAGE), (0, -1), (2**63, PAGE)])
def test_a_piece_outside_of_the_range_is_refused(shards, at, num_bytes):
    regions, _ = shards
    with pytest.raises(ValueError, match="outside of a range of"):
        map_files([FileRegion(regions[0].path, at, num_bytes)], PAGE)


def test_a_piece_that_starts_inside_a_page_cannot_be_mapped(shards):
    regions, _ = shards
    with pytest.raises(MappingUnsupported, match="would start at byte 512, inside a page"):
        map_files([FileRegion(regions[0].path, 512, 100)], PAGE)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("platform", "darwin", "needs little-endian Linux: .* darwin"),
        ("byteorder", "big", "little-endian.* this is big"),
    ],
)
def test_another_system_cannot_map(shards, monkeypatch, name, value, why):
    regions, expected = shards
    monkeypatch.setattr(sys, name, value)
    with pytest.raises(MappingUnsupported, match=why):
        map_files(regions, len(expected))


def test_system_errors_are_reported(shards, tmp_path):
    regions, _ = shards
    with pytest.raises(MappingUnsupported, match="no address range of 4,611,686,018,427,387,904 bytes"):
        map_files([], 2**62)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    with pytest.raises(MappingUnsupported, match=f"{folder} cannot be mapped: "):
        map_files([*regions[:2], FileRegion(folder, 2 * PAGE, 1)], 3 * PAGE)
    assert maps_of(tmp_path) == 0
