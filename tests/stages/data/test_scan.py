from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdpipe.stages.data import image_source, scan, scan_cache
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.decode import UnreadableImage
from kdpipe.stages.data.image_set import (
    FILES_NORMALIZATION,
    ImageSet,
    digest,
    normalization,
    pixel_checksums,
    unequal_sizes_message,
)
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and files that count as old although they were written just now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scan_cache, "RACY_NS", -(10**11))
    return tmp_path / "cache" / "kdpipe" / "images"


class _Clock:
    """Gives each written file a time of its own: a disk's clock may stand still between two writes."""

    now_ns = 10**18

    def write(self, path: Path, seed: int, size: tuple[int, int] = (4, 3)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        aside = path.with_suffix(".new")
        Image.fromarray(noise).save(aside, format="BMP")  # always of the same number of bytes
        self.touch(aside)
        aside.replace(path)

    def touch(self, path: Path) -> None:
        self.now_ns += 1000
        os.utime(path, ns=(self.now_ns, self.now_ns))


CLOCK = _Clock()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for index in range(6):
        CLOCK.write(tmp_path / "pets" / ("cat" if index % 2 else "dog") / f"{index}.bmp", index)
    return tmp_path / "pets"


@contextmanager
def decoding() -> Iterator[list[str]]:
    """The names of the files that are decoded for a data set, as they come."""
    decoded: list[str] = []
    real = image_source.decode_image

    def decode(path: str, spec: Any) -> Any:
        decoded.append(Path(path).name)
        return real(path, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_source, "decode_image", decode)
        yield decoded


def _load(path: Path, split: str = "train", on_image: Any = None, **keys: Any) -> ImageSet:
    config = DataConfig(name=f"imagefolder:{path}", **{"cache_bytes": 0} | keys)
    return load_dataset(config, split, on_image=on_image)  # type: ignore[arg-type]


def test_a_second_job_decodes_nothing(pets: Path) -> None:
    with decoding() as first_time:
        first = _load(pets)
    with decoding() as second_time:
        second = _load(pets)
    assert len(first_time) == first.num_samples == 4
    assert second_time == []
    assert digest(first) == digest(second)
    assert np.array_equal(pixel_checksums(first), pixel_checksums(second))
    assert first.image_size == second.image_size == (3, 4)
    assert np.array_equal(first.read(1), second.read(1))


def test_splits_and_subsets_share_a_cache_file(pets: Path, cache: Path) -> None:
    _load(pets)
    _load(pets, "test")
    _load(pets, num_train=2)
    assert len(list(cache.iterdir())) == 1
    with decoding() as decoded:
        _load(pets, test_share=0.5), _load(pets, "test", test_share=0.5)
    assert decoded == []


def test_another_spec_is_decoded_again(pets: Path) -> None:
    _load(pets)
    for keys in ({"channels": 1}, {"image_size": 2}):
        with decoding() as decoded:
            decoded_set = _load(pets, **keys)
        assert len(decoded) == 4
        assert np.array_equal(pixel_checksums(decoded_set), pixel_checksums(_load(pets, **keys, cache_bytes=2**20)))


def test_images_in_memory_need_no_cache(pets: Path, cache: Path) -> None:
    for size in (None, 2):
        assert _load(pets, image_size=size, cache_bytes=2**20).in_memory
    assert not cache.exists()


@pytest.mark.parametrize("extra", [0, 1])
def test_cache_bytes_decides_what_is_in_memory(pets: Path, extra: int) -> None:
    for size, pixels in ((None, 12), (2, 4)):
        num_bytes = 4 * 3 * pixels
        for _ in range(2):  # with an index and without
            assert _load(pets, image_size=size, cache_bytes=num_bytes - extra).in_memory == (extra == 0)


def test_unneeded_cache_changes_nothing(pets: Path) -> None:
    files = _load(pets)
    in_memory = _load(pets, cache_bytes=2**20)
    assert in_memory.in_memory
    assert np.array_equal(pixel_checksums(in_memory), pixel_checksums(files))
    assert np.array_equal(in_memory.read(2), files.read(2))


def test_unequal_images_are_decoded_only_once(pets: Path) -> None:
    CLOCK.write(pets / "cat" / "odd.bmp", 9, size=(5, 5))
    with decoding() as decoded:
        first = _load(pets, cache_bytes=2**20, test_share=0.1)
    assert not first.in_memory and first.image_size is None
    assert "odd.bmp" in decoded and len(decoded) == len(set(decoded)) == first.num_samples
    with decoding() as decoded:
        second = _load(pets, cache_bytes=2**20, test_share=0.1)
    assert decoded == []
    assert unequal_sizes_message(second) == unequal_sizes_message(first)


def test_recently_changed_files_are_not_cached(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cache, "RACY_NS", 10**18)
    _load(pets)
    with decoding() as decoded:
        _load(pets)
    assert len(decoded) == 4


def test_file_changed_while_decoding_is_not_cached(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = image_source.decode_image
    changed: list[str] = []

    def decode(path: str, spec: Any) -> Any:
        pixels = real(path, spec)
        if Path(path).parent.name == "dog":
            changed.append(Path(path).name)
            CLOCK.write(Path(path), seed=99)
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(image_source, "decode_image", decode)
        _load(pets)
    with decoding() as decoded:
        _load(pets)
    assert sorted(decoded) == sorted(changed) and len(changed) == 2


ACTS = st.lists(
    st.tuples(st.sampled_from(["touch", "edit", "replace", "vanish", "load"]), st.integers(0, 4)), max_size=10
)


@settings(max_examples=20, deadline=None)
@given(acts=ACTS)
def test_cache_is_correct_after_any_file_changes(acts: list[tuple[str, int]]) -> None:
    """A set loaded with the help of an index is the one that is loaded without, and untouched files are not decoded."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{scratch}/cache")
        patch.setattr(scan_cache, "RACY_NS", -(10**11))
        folder = Path(scratch) / "pets"
        CLOCK.write(folder / "train" / "cat" / "stays.bmp", 0)
        changed = {"stays.bmp"}
        for seed, (act, number) in enumerate([*acts, ("load", 0), ("load", 0)]):
            path = folder / "train" / "cat" / f"{number}.bmp"
            if act == "load":
                with decoding() as decoded:
                    files = _load(folder)
                assert set(decoded) == {name for name in changed if (path.parent / name).exists()}
                in_memory = _load(folder, cache_bytes=2**20)
                assert digest(files) == digest(in_memory)
                assert np.array_equal(pixel_checksums(files), pixel_checksums(in_memory))
                changed = set()
                continue
            if act == "vanish":
                path.unlink(missing_ok=True)
            elif act == "touch" and path.exists():
                CLOCK.touch(path)
            else:
                CLOCK.write(path, seed)
            changed.add(path.name)


def test_progress_is_reported_to_the_end(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "REPORT_EVERY_S", 0.0)
    messages: list[tuple[int, int]] = []
    _load(pets, on_image=lambda done, total: messages.append((done, total)))
    assert messages == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    messages.clear()
    _load(pets, on_image=lambda done, total: messages.append((done, total)))
    assert messages == [(4, 4)]


def test_aborted_scan_resumes(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "REPORT_EVERY_S", 0.0)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        _load(pets, on_image=stop)
    with decoding() as decoded:
        _load(pets)
    assert len(decoded) == 1


def test_scan_is_saved_periodically(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK", 1)
    monkeypatch.setattr(scan_cache, "SAVE_EVERY_S", 0.0)
    saved: list[int] = []
    real = scan_cache.write_cache
    monkeypatch.setattr(scan_cache, "write_cache", lambda path, index: saved.append(len(index)) or real(path, index))
    _load(pets)
    assert saved == [1, 2, 3, 4]


def test_damaged_cache_is_ignored(pets: Path, cache: Path) -> None:
    first = _load(pets)
    (file,) = cache.iterdir()
    file.write_bytes(b"damaged")
    with decoding() as decoded:
        second = _load(pets)
    assert len(decoded) == 4
    assert np.array_equal(pixel_checksums(first), pixel_checksums(second))


def test_unwritable_cache_folder_is_ignored(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pets.parent / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(pets.parent / "file"))
    assert _load(pets).num_samples == _load(pets).num_samples == 4


def test_deleted_images_are_removed_from_the_cache(pets: Path, cache: Path) -> None:
    _load(pets), _load(pets, "test")
    (file,) = cache.iterdir()
    assert len(scan_cache.read_cache(file)) == 6
    (pets / "cat" / "1.bmp").unlink()
    CLOCK.write(pets / "cat" / "3.bmp", 77)
    _load(pets), _load(pets, "test")
    ids = scan_cache.read_cache(file)["id"].tolist()
    assert sorted(ids) == sorted(sample_id(Path(path).relative_to(pets).as_posix()) for path in pets.rglob("*.bmp"))
    assert len(ids) == 5


KEYS = [{}, {"cache_bytes": 2**20}, {"cache_bytes": 2**20, "image_size": 2}]


def _damage(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"damaged")


@pytest.mark.parametrize("keys", KEYS, ids=["files", "in memory", "in memory, resized"])
def test_unreadable_images_stop_the_job(pets: Path, keys: dict[str, Any]) -> None:
    _damage(pets, "dog/2.bmp")
    with pytest.raises(DataError) as raised:
        _load(pets, **keys), _load(pets, "test", **keys)
    message = str(raised.value)
    assert message.startswith(
        f"sample {sample_id('dog/2.bmp')} cannot be read: {pets / 'dog' / '2.bmp'} cannot be decoded"
    )
    assert "data.unreadable = 'drop'" in message


@pytest.mark.parametrize("keys", KEYS, ids=["files", "in memory", "in memory, resized"])
def test_unreadable_images_are_dropped_and_listed(pets: Path, keys: dict[str, Any]) -> None:
    train = {"classes": ("cat", "dog"), "test_share": 0.01, **keys}
    whole = _load(pets, **train)
    damaged, gone = (whole.sample_ids.tolist()[index] for index in (0, 2))
    path_of = {sample_id(Path(path).relative_to(pets).as_posix()): path for path in pets.rglob("*.bmp")}
    path_of[damaged].write_bytes(b"damaged")
    path_of[gone].unlink()
    path_of[gone].symlink_to("nowhere")
    for _ in range(2):  # with an index and without
        left = _load(pets, **train, unreadable="drop")
        assert left.sample_ids.tolist() == [whole.sample_ids.tolist()[index] for index in (1, 3)]
        assert left.labels.tolist() == whole.labels[[1, 3]].tolist()
        assert left.class_names == whole.class_names
        assert np.array_equal(pixel_checksums(left), pixel_checksums(whole)[[1, 3]])
        assert [(entry.path, entry.sample_id) for entry in left.dropped] == [
            (str(path_of[damaged]), damaged),
            (str(path_of[gone]), gone),
        ]
        assert "cannot be decoded" in left.dropped[0].why
        assert "No such file or directory" in left.dropped[1].why
    assert whole.dropped == ()


def test_cached_image_that_became_unreadable_is_dropped(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = _load(pets), image_source.decode_image

    def decode(path: str, spec: Any) -> Any:  # a disk that fails changes no stamp
        if sample_id(Path(path).relative_to(pets).as_posix()) == files.sample_ids[1]:
            raise UnreadableImage(f"{path} cannot be read (Input/output error)")
        return real(path, spec)

    monkeypatch.setattr(image_source, "decode_image", decode)
    in_memory = _load(pets, cache_bytes=2**20, unreadable="drop")
    assert in_memory.sample_ids.tolist() == files.sample_ids[[0, 2, 3]].tolist()
    assert [entry.sample_id for entry in in_memory.dropped] == [files.sample_ids[1]]
    assert np.array_equal(pixel_checksums(in_memory), pixel_checksums(files)[[0, 2, 3]])


@pytest.mark.parametrize("keys", KEYS, ids=["files", "in memory", "in memory, resized"])
def test_mostly_unreadable_set_is_an_error(pets: Path, keys: dict[str, Any]) -> None:
    _damage(pets, *[path.relative_to(pets).as_posix() for path in sorted(pets.rglob("*.bmp"))])
    with pytest.raises(DataError, match="more than half of its 4 images cannot be read"):
        _load(pets, **keys, unreadable="drop")


def test_images_that_are_not_kept_have_the_same_identity(pets):
    config = DataConfig(name=f"imagefolder:{pets}", channels=1, test_share=0.5)
    kept, counted = (load_dataset(config, "train", keep=keep) for keep in (True, False))
    assert (kept.in_memory, counted.in_memory) == (True, False)
    assert normalization(counted) == normalization(kept) != FILES_NORMALIZATION[1]
    assert digest(counted) == digest(kept)
    np.testing.assert_array_equal(pixel_checksums(counted), pixel_checksums(kept))
    files = load_dataset(dataclasses.replace(config, cache_bytes=20), "train", keep=False)
    assert normalization(files) == FILES_NORMALIZATION[1]  # a run would not keep them either
