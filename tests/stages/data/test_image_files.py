from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdpipe.stages.data import decode as pixels
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.image_set import ImageSet, normalization, pixel_checksums, unequal_sizes_message
from kdpipe.stages.data.image_source import FilePaths
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _write(path: Path, seed: int, width: int = 8, height: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two cats of 8 x 6 (width x height) and two dogs of 5 x 7."""
    for index, name in enumerate(["cat/a.png", "cat/b.jpg"]):
        _write(tmp_path / "pets" / "train" / name, index)
    for index, name in enumerate(["dog/c.png", "dog/d.bmp"]):
        _write(tmp_path / "pets" / "train" / name, 10 + index, 5, 7)
    return tmp_path / "pets"


def _load(path: Path, **keys: object) -> ImageSet:
    return load_dataset(DataConfig(name=f"imagefolder:{path}", **keys), "train")  # type: ignore[arg-type]


def _files(image_set: ImageSet) -> ImageFiles:
    assert isinstance(image_set.images, ImageFiles)
    return image_set.images


def test_unequal_photographs_are_read_unchanged(pets: Path) -> None:
    train = _load(pets)
    assert not train.in_memory
    assert (train.num_samples, train.in_channels, train.image_size) == (4, 3, None)
    assert _files(train).shapes.tolist() == [[6, 8], [6, 8], [7, 5], [7, 5]]
    for index in range(4):
        path, image = _files(train).source.where(index), train.read(index)
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1))
        assert image.flags.writeable and image.flags.c_contiguous


@pytest.mark.parametrize(("channels", "mean", "std"), [(1, (0.449,), (0.226,)), (3, (0.485, 0.456, 0.406), None)])
def test_photographs_in_files_are_normalized_as_imagenet(
    pets: Path, channels: int, mean: tuple[float, ...], std: tuple[float, ...] | None
) -> None:
    assert normalization(_load(pets, channels=channels)) == (mean, std or (0.229, 0.224, 0.225))


def test_files_and_memory_have_the_same_pixels(pets: Path) -> None:
    in_memory, files = (_load(pets, image_size=4, cache_bytes=most) for most in (4 * 3 * 4 * 4, 4 * 3 * 4 * 4 - 1))
    assert (in_memory.in_memory, files.in_memory) == (True, False)
    assert files.image_size == in_memory.image_size == (4, 4)
    assert np.array_equal(pixel_checksums(files), pixel_checksums(in_memory))
    assert pixel_checksums(files).dtype == np.uint32
    for index in range(4):
        assert np.array_equal(files.read(index), in_memory.read(index))


def test_read_from_memory_returns_a_copy(pets: Path) -> None:
    in_memory = _load(pets, image_size=4)
    before = in_memory.read(0)
    in_memory.read(0)[:] = 0
    assert np.array_equal(in_memory.read(0), before) and before.any()


@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["files", "in memory"])
def test_taking_rows_takes_everything_of_them(pets: Path, cache_bytes: int) -> None:
    train = _load(pets, image_size=4, cache_bytes=cache_bytes)
    taken = train.take(torch.tensor([3, 0]))
    assert (taken.num_samples, taken.num_classes, taken.in_memory) == (2, 2, train.in_memory)
    assert taken.labels.tolist() == [1, 0]
    assert taken.sample_ids.tolist() == train.sample_ids[[3, 0]].tolist()
    assert pixel_checksums(taken).tolist() == pixel_checksums(train)[[3, 0]].tolist()
    assert np.array_equal(taken.read(0), train.read(3))


def test_taking_equal_ones_of_unequal_images_gives_them_a_size(pets: Path) -> None:
    assert _load(pets).take(torch.tensor([2, 3])).image_size == (7, 5)


def test_two_images_of_unequal_size_are_named(pets: Path) -> None:
    train = _load(pets)
    message = unequal_sizes_message(train)
    assert f"{pets / 'train' / 'cat' / 'a.png'} is 8 x 6" in message
    assert f"{pets / 'train' / 'dog' / 'c.png'} is 5 x 7" in message
    assert "data.image_size" in message
    with pytest.raises(ValueError, match="have the same size"):
        unequal_sizes_message(train.take(torch.tensor([0, 1])))


def test_an_image_edited_since_is_refused(pets: Path) -> None:
    train, edited = _load(pets), pets / "train" / "dog" / "c.png"
    _write(edited, seed=99, width=5, height=7)
    with pytest.raises(DataError, match=r"dog/c\.png changed since the data set was first read"):
        train.read(2)
    train.read(3)


def test_an_image_of_the_same_bytes_in_another_shape_is_refused(pets: Path) -> None:
    path = pets / "train" / "cat" / "a.png"
    Image.new("RGB", (8, 6)).save(path)
    train = _load(pets)
    Image.new("RGB", (6, 8)).save(path)
    with pytest.raises(DataError, match="changed since the data set"):
        train.read(0)


def test_an_image_rewritten_with_the_same_pixels_is_the_same(pets: Path) -> None:
    train, path = _load(pets), pets / "train" / "cat" / "a.png"
    before = train.read(0)
    Image.open(path).copy().save(path, compress_level=0)
    assert np.array_equal(train.read(0), before)


def test_a_vanished_image_is_named(pets: Path) -> None:
    train = _load(pets)
    (pets / "train" / "cat" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/b\.jpg cannot be read \(No such file or directory\)"):
        train.read(1)


def test_a_damaged_image_is_named(pets: Path) -> None:
    train = _load(pets)
    (pets / "train" / "cat" / "b.jpg").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"cat/b\.jpg cannot be decoded"):
        train.read(1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), r"a\.png cannot be read \(Permission denied\)"),
        (OSError(24, "Too many open files"), r"a\.png cannot be read now .* ran out of memory or file handles"),
        (MemoryError(), r"a\.png cannot be read now .* ran out of memory or file handles"),
    ],
)
def test_system_errors_are_reported(
    pets: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    train = _load(pets)

    def refuse(*args: object, **keys: object) -> None:
        raise error

    monkeypatch.setattr(pixels.Image, "open", refuse)
    with pytest.raises(DataError, match=message):
        train.read(0)


def test_machine_error_drops_no_sample(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = pixels.Image.open

    def refuse(path: str, **keys: object) -> Image.Image:
        if Path(path).name == "c.png":
            raise OSError(24, "Too many open files")
        return opened(path, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(pixels.Image, "open", refuse)
    with pytest.raises(DataError, match="ran out of memory or file handles"):
        _load(pets, unreadable="drop")


def test_files_cross_to_another_process(pets: Path) -> None:
    train = _load(pets)
    there = pickle.loads(pickle.dumps(_files(train)))
    assert np.array_equal(there.read(2), train.read(2))


def test_image_files_hold_only_arrays(pets: Path) -> None:
    files = _files(_load(pets))
    assert isinstance(files.source, FilePaths)
    arrays = [files.source.paths, files.checksums, files.shapes]
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
    assert set(vars(files)) - {"common_shape"} == {"source", "spec", "checksums", "shapes", "levels"}


def test_packed_paths_round_trip() -> None:
    names = ["/a/b.png", "/a/é.png", os.fsdecode(b"/a/not utf-8 \xff.png"), "/c"]
    paths = FilePaths.pack(names)
    assert [paths.where(index) for index in range(4)] == names
    assert len(FilePaths.pack([])) == 0
