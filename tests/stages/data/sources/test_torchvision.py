from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.errors import DataError

RNG = np.random.default_rng(0)


def _idx(array: np.ndarray) -> bytes:
    """The IDX file of uint8 `array`: big-endian magic, sizes, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _write_mnist(root: Path, name: str = "MNIST", num_train: int = 20) -> dict[str, np.ndarray]:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", num_train), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for file, array in arrays.items():
        (raw / file).write_bytes(_idx(array))
    return arrays


def _write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A tiny CIFAR of one training and one test batch, and its md5 in place of the published ones."""
    cls = getattr(datasets, name)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    labels_key = "labels" if name == "CIFAR10" else "fine_labels"
    data = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
    batches = {file: {"data": data, labels_key: [0, 1, 2, 3, 4, 9]} for file in ("batch", "tests")}
    contents: dict[str, Any] = {**batches, "names": {cls.meta["key"]: [f"class {each}" for each in range(10)]}}
    md5 = {}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
        md5[file] = hashlib.md5(pickle.dumps(content)).hexdigest()
    monkeypatch.setattr(cls, "train_list", [["batch", md5["batch"]]])
    monkeypatch.setattr(cls, "test_list", [["tests", md5["tests"]]])
    monkeypatch.setattr(cls, "meta", {"filename": "names", "key": cls.meta["key"], "md5": md5["names"]})
    return data.reshape(6, 3, 32, 32)


def _config(root: Path, name: str = "MNIST", *, download: bool = False) -> DataConfig:
    return DataConfig(name=name, root=str(root), download=download)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_both_mnists_are_read_from_their_four_files(tmp_path: Path, name: str) -> None:
    arrays = _write_mnist(tmp_path, name)
    for split, part, count in (("train", "train", 20), ("test", "t10k", 10)):
        image_set = load_dataset(_config(tmp_path, name), split)  # type: ignore[arg-type]
        assert image_set.images.shape == (count, 1, 28, 28)
        assert np.array_equal(image_set.images[:, 0].numpy(), arrays[f"{part}-images-idx3-ubyte"])
        assert np.array_equal(image_set.labels.numpy(), arrays[f"{part}-labels-idx1-ubyte"])
        assert image_set.sample_ids.tolist() == list(range(count))
        assert (image_set.name, image_set.num_classes) == (name, 10)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_both_cifars_are_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _write_cifar(tmp_path, name, monkeypatch)
    image_set = load_dataset(_config(tmp_path, name), "test")
    assert np.array_equal(image_set.images.numpy(), images)
    assert image_set.labels.tolist() == [0, 1, 2, 3, 4, 9]
    assert image_set.class_names[1] == "class 1"


class _Trap:
    """Unpickling this makes a folder, which tells that code was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_is_not_the_published_one_is_never_opened(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / file).write_bytes(pickle.dumps(_Trap(sprung)))
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    for file in ("training.pt", "test.pt"):  # torchvision's old format, which it still prefers
        torch.save(_Trap(sprung), tmp_path / "MNIST" / "processed" / file)
    for name in ("CIFAR10", "MNIST"):
        with pytest.raises(DataError):
            load_dataset(_config(tmp_path, name), "train")
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("MNIST", "MNIST/raw"), ("FashionMNIST", "FashionMNIST/raw"), ("CIFAR100", "cifar-100-python")],
)
def test_missing_files_error_has_the_path(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset(_config(tmp_path, name), "train")
    message = str(raised.value)
    assert str(tmp_path / folder) in message
    assert "data.root" in message and "data.download=true" in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 3, 10, 1000])
def test_truncated_file_error_is_one_line(tmp_path: Path, keep: int) -> None:
    _write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read") as raised:
        load_dataset(_config(tmp_path), "train")
    assert "\n" not in str(raised.value)


def test_more_labels_than_images_are_refused(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(_idx(np.zeros(11, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"labels must be integers \[10\]"):
        load_dataset(_config(tmp_path), "test")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An MNIST that a download brings, noisily, as torchvision's does."""
    source = tmp_path / "published"
    _write_mnist(source)

    def download(self: datasets.MNIST) -> None:
        print("Downloading")
        Path(self.raw_folder).mkdir(parents=True)
        for file in (source / "MNIST" / "raw").iterdir():
            (Path(self.raw_folder) / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(datasets.MNIST, "download", download)
    return tmp_path / "root"


def test_missing_files_are_downloaded_silently(published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image_set = load_dataset(_config(published, download=True), "train")
    assert image_set.num_samples == 20
    assert capfd.readouterr() == ("", "")
    assert [entry.name for entry in published.iterdir()] == ["MNIST"]
    assert load_dataset(_config(published), "train").num_samples == 20


def test_files_of_a_killed_download_are_replaced(published: Path) -> None:
    load_dataset(_config(published, download=True), "train")
    torn = published / "MNIST" / "raw" / "train-images-idx3-ubyte"
    torn.write_bytes(torn.read_bytes()[:100])
    assert load_dataset(_config(published, download=True), "train").num_samples == 20


def test_failed_download_has_advice_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no\nnetwork")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(DataError) as raised:
        load_dataset(_config(tmp_path, "CIFAR10", download=True), "train")
    message = str(raised.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "no network" in message and "data.root" in message and "data.download=false" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_good_local_copy_is_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_mnist(tmp_path)
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: pytest.fail("downloaded"))
    assert load_dataset(_config(tmp_path, download=True), "test").num_samples == 10
