from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.stages.data import scan_cache
from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_source import NO_STAMP, Stamp, stamp
from kdpipe.stages.data.scan_cache import (
    ENTRY,
    RACY_NS,
    Entries,
    cache_path,
    find_valid,
    is_settled,
    merge,
    read_cache,
    write_cache,
)

SPEC = DecodeSpec(3, 8)
EMPTY = np.empty(0, ENTRY)


def _entries(stamps: dict[int, Stamp], checksum: int = 7) -> Entries:
    return np.array([(key, stamps[key], checksum, (8, 8)) for key in sorted(stamps)], dtype=ENTRY)


class _Disk:
    """Files by sample id, as os.stat sees them; each change takes place at a time of its own."""

    def __init__(self, num_files: int) -> None:
        self.now = 1000
        self.files: dict[int, Stamp] = dict.fromkeys(range(num_files), (10, 1000, 1000))

    def do(self, what: str, key: int) -> None:
        self.now += 1
        size, mtime, _ = self.files.get(key, (10, self.now, self.now))
        match what:
            case "touch" | "edit in place":
                self.files[key] = (size, self.now, self.now)
            case "edit":
                self.files[key] = (size + 1, self.now, self.now)
            case "replace, keeping size and mtime":
                self.files[key] = (size, mtime, self.now)
            case "edit, with the clock set back":
                self.files[key] = (size + 1, mtime, 1000)
            case "vanish":
                self.files.pop(key, None)


ACTS = [
    "touch",
    "edit in place",
    "edit",
    "replace, keeping size and mtime",
    "edit, with the clock set back",
    "vanish",
]


@given(st.sets(st.integers(0, 9)), st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 9)), max_size=12))
def test_entry_is_valid_until_its_file_changes(known: set[int], acts: list[tuple[str, int]]) -> None:
    disk = _Disk(10)
    entries = _entries({key: disk.files[key] for key in known})
    for what, key in acts:
        disk.do(what, key)
    ids = np.arange(10)[::-1].copy()
    stamps = np.array([disk.files.get(key, NO_STAMP) for key in ids.tolist()], dtype=np.int64)
    found = find_valid(entries, ids, stamps)
    untouched = known - {key for _, key in acts}
    assert {key for key, position in zip(ids.tolist(), found.tolist(), strict=True) if position >= 0} == untouched
    assert entries["id"][found[found >= 0]].tolist() == sorted(untouched, reverse=True)


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_newer_entries_replace_older_ones(older: set[int], newer: set[int]) -> None:
    old = _entries(dict.fromkeys(older, (1, 1, 1)), checksum=1)
    new = _entries(dict.fromkeys(newer, (2, 2, 2)), checksum=2)
    both = merge(old, new)
    assert both["id"].tolist() == sorted(older | newer)
    expected = [2 if key in newer else 1 for key in both["id"].tolist()]
    assert both["checksum"].tolist() == both["stamp"][:, 0].tolist() == expected


def test_file_without_a_stamp_is_never_valid(tmp_path: Path) -> None:
    assert stamp(tmp_path / "gone") == NO_STAMP
    entries = _entries({5: NO_STAMP})
    assert find_valid(entries, np.array([5]), np.array([NO_STAMP])).tolist() == [-1]


def test_a_stamp_is_size_and_both_times(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    status = file.stat()
    assert stamp(file) == (5, status.st_mtime_ns, status.st_ctime_ns)


@pytest.mark.parametrize("position", [1, 2], ids=["mtime", "ctime"])
def test_recently_changed_file_is_not_cached(position: int) -> None:
    # Within one tick of the disk's clock it could change once more, and its stamp would not show it.
    now = 10**18
    old, fresh = [9, 1, 1], [9, 1, 1]
    old[position], fresh[position] = now - RACY_NS - 1, now - RACY_NS
    assert is_settled((old[0], old[1], old[2]), now)
    assert not is_settled((fresh[0], fresh[1], fresh[2]), now)
    assert not is_settled(NO_STAMP, now)


def test_cache_round_trip(tmp_path: Path) -> None:
    entries, path = _entries({3: (1, 2, 3), 2**62: (4, 5, 6)}), tmp_path / "deep" / "er" / "a.npz"
    write_cache(path, entries)
    assert np.array_equal(read_cache(path), entries)
    assert [key.name for key in path.parent.iterdir()] == ["a.npz"]


def test_missing_cache_is_empty(tmp_path: Path) -> None:
    for path in (None, tmp_path / "none.npz", tmp_path, tmp_path / "none" / "none.npz"):
        assert len(read_cache(path)) == 0


def test_unwritable_cache_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    write_cache(tmp_path / "file" / "a.npz", _entries({1: (1, 1, 1)}))
    write_cache(None, _entries({1: (1, 1, 1)}))
    assert [key.name for key in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("where", "name", "value"), [(scan_cache, "VERSION", 99), (scan_cache.PIL, "__version__", "99.0")]
)
def test_cache_of_another_version_or_decoder_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    path = tmp_path / "a.npz"
    write_cache(path, _entries({1: (1, 1, 1)}))
    assert len(read_cache(path)) == 1
    monkeypatch.setattr(where, name, value)
    assert len(read_cache(path)) == 0


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    entries = _entries({key: (key, 2, 3) for key in range(5)})
    write_cache(path, entries)
    intact = path.read_bytes()
    for position in range(0, len(intact), 7):
        flipped = bytes([intact[position] ^ 0x10])
        for damaged in (intact[:position], intact[:position] + flipped + intact[position + 1 :]):
            path.write_bytes(damaged)
            found = read_cache(path)
            assert len(found) == 0 or np.array_equal(found, entries)


@pytest.mark.parametrize(
    "changes",
    [
        {"entries": _entries({4: (1, 1, 1), 1: (1, 1, 1)})[::-1]},
        {"entries": np.repeat(_entries({1: (1, 1, 1)}), 2)},
        {"entries": np.zeros((), ENTRY)},
        {"entries": np.zeros(2, dtype=np.int64)},
        {"entries": np.array([None, None], dtype=object)},
        {"made_by": np.array(["another program"])},
    ],
)
def test_file_of_another_layout_is_ignored(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, entries = tmp_path / "a.npz", _entries({1: (1, 1, 1), 4: (1, 1, 1)})
    write_cache(path, entries)
    arrays = {"made_by": np.load(path)["made_by"], "entries": entries}
    for written, num_entries in ((arrays, 2), (arrays | changes, 0)):
        np.savez(path, **written)
        assert len(read_cache(path)) == num_entries


def test_each_folder_and_spec_has_a_cache_file(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    specs = [SPEC, DecodeSpec(1, 8), DecodeSpec(3, None), DecodeSpec(3, 8, 0.875)]
    folders = [tmp_path / "a", tmp_path / "b"]
    paths = {cache_path(folder, spec, environ) for folder in folders for spec in specs}
    assert len(paths) == 8
    assert {path.parent for path in paths if path} == {tmp_path / "kdpipe" / "images"}


def test_cache_is_in_home_without_xdg_cache_home() -> None:
    for environ in ({"HOME": "/home/me"}, {"HOME": "/home/me", "XDG_CACHE_HOME": "relative"}):
        path = cache_path(Path("/data"), SPEC, environ)
        assert path is not None and path.parent == Path("/home/me/.cache/kdpipe/images")


def test_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_path(Path("/data"), SPEC, {}) is None


def test_empty_cache_has_no_entries() -> None:
    assert find_valid(EMPTY, np.array([1, 2]), np.ones((2, 3), dtype=np.int64)).tolist() == [-1, -1]
    entries = _entries({1: (1, 1, 1)})
    assert np.array_equal(merge(EMPTY, entries), entries)
    assert np.array_equal(merge(entries, EMPTY), entries)
