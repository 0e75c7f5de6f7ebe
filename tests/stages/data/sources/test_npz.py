from __future__ import annotations

import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 4), dtype=np.uint8)
LABELS = np.arange(12) % 3


def _load(path: Path, split: str = "train") -> ImageSet:
    return load_dataset(DataConfig(name=f"npz:{path}"), split)  # type: ignore[arg-type]


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _zip(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _claimed(shape: tuple[int, ...], dtype: str = "|u1", content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("keys", "splits", "told"),
    [
        ("{0}_images {0}_labels", "train val test", "test_images the test split, val_images is not used."),
        ("{0}_images {0}_labels", "train val", "val_images the test split."),
        ("x_{0} y_{0}", "train test", "x_test the test split."),
    ],
)
def test_one_file_may_hold_the_splits(tmp_path: Path, keys: str, splits: str, told: str) -> None:
    names, labels = keys.split(), LABELS[:, None].astype(np.uint8)
    arrays = {}
    for number, split in enumerate(splits.split()):
        arrays |= {names[0].format(split): IMAGES[number:], names[1].format(split): labels[number:]}
    np.savez(tmp_path / "toymnist.npz", **arrays)
    train, test = (_load(tmp_path / "toymnist.npz", split) for split in ("train", "test"))
    assert np.array_equal(train.images[:, 0].numpy(), IMAGES) and train.labels.tolist() == LABELS.tolist()
    assert np.array_equal(test.images[:, 0].numpy(), IMAGES[number:]) and test.class_names == ("0", "1", "2")
    assert train.notices[0].startswith("toymnist.npz: ") and train.notices[0].endswith(told)


def test_one_file_with_a_training_split_alone_is_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "toymnist.npz", train_images=IMAGES, train_labels=LABELS)
    assert [_load(tmp_path / "toymnist.npz", split).num_samples for split in ("train", "test")] == [9, 3]


def test_labels_from_one_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS + 1)
    assert _load(tmp_path / "a.npz").notices == (
        "data set npz:a.npz (train): 1 of 4 classes have no sample: '0'. Labels count from 0, and here they start at "
        "1: subtract 1.",
    )
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS + 1, classes=np.array(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"outside 0..2. The labels start at 1: subtract 1."):
        _load(tmp_path / "a.npz")


def test_classes_without_a_sample_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS * 2)
    assert "2 of 5 classes have no sample: '1', '3'. A network" in _load(tmp_path / "a.npz").notices[0]
    config = DataConfig(name=f"npz:{tmp_path}/a.npz", classes=("0", "2"))
    assert load_dataset(config, "train").notices == ()


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    rgb = np.random.default_rng(1).integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
    np.savez(folder / "train.npz", images=rgb, labels=LABELS)
    np.savez_compressed(folder / "test.npz", images=rgb[:2], labels=np.array([1, 0], dtype=">u2"), ids=np.array([9, 4]))
    train, test = _load(folder), _load(folder, "test")
    assert (train.name, test.split) == ("npz:toy", "test")
    assert np.array_equal(train.images.numpy(), rgb.transpose(0, 3, 1, 2))
    assert train.sample_ids.tolist() == list(range(12))
    assert test.labels.tolist() == [1, 0]
    assert test.sample_ids.tolist() == [9, 4]
    assert test.class_names == ("0", "1", "2")  # the train split's, though the test split shows two of them


def test_one_file_is_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", images=IMAGES, labels=LABELS, ids=np.arange(100, 112), classes=["a", "b", "c"])
    train, test = _load(tmp_path / "toy.npz"), _load(tmp_path / "toy.npz", "test")
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert sorted(train.sample_ids.tolist() + test.sample_ids.tolist()) == list(range(100, 112))
    assert np.array_equal(test.images[:, 0].numpy(), IMAGES[test.sample_ids.numpy() - 100])


def test_a_column_major_array_reads_right(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", images=np.asfortranarray(IMAGES), labels=LABELS)
    test = _load(tmp_path / "toy.npz", "test")
    assert np.array_equal(test.images[:, 0].numpy(), IMAGES[test.sample_ids.numpy()])


HOSTILE = {
    "not a zip": (b"hello", "cannot be read as .npz"),
    "nothing": (b"", "cannot be read as .npz"),
    "a plain .npy": (_npy(IMAGES), "cannot be read as .npz"),
    "cut short": (_npz(images=IMAGES, labels=LABELS)[:-40], "cannot be read as .npz"),
    "an empty zip": (_zip(), "has no array 'images': found none"),
    "other keys": (_npz(x=IMAGES, labels=LABELS), "has no array 'images': found labels, x"),
    "no labels": (_npz(images=IMAGES), "has no array 'labels': found images"),
    "float images": (
        _npz(images=IMAGES / 255, labels=LABELS),
        "images must be uint8 (0..255), no side 0, found float64",
    ),
    "flat images": (_npz(images=IMAGES[0], labels=LABELS), "images must be [N, H, W] or [N, H, W, C]"),
    "channels first": (
        _npz(images=np.zeros((12, 3, 8, 8), dtype=np.uint8), labels=LABELS),
        "found [12, 3, 8, 8]. Channels come last: move axis 1 to the end.",
    ),
    "two channels": (_npz(images=np.zeros((12, 8, 8, 2), dtype=np.uint8), labels=LABELS), "found [12, 8, 8, 2]."),
    "float labels": (_npz(images=IMAGES, labels=LABELS / 1), "labels must be integers [N], one for each image"),
    "too few labels": (_npz(images=IMAGES, labels=LABELS[:5]), "labels must be integers [12], one for each image"),
    "one-hot labels": (_npz(images=IMAGES, labels=np.eye(12, dtype=int)), "found int64 [12, 12]"),
    "a negative label": (_npz(images=IMAGES, labels=LABELS - 2), "has the label -2, which is outside 0..0"),
    "a huge label": (_npz(images=IMAGES, labels=LABELS + 10**12), f"the label {10**12 + 2} is too large"),
    "a label beyond int64": (_npz(images=IMAGES, labels=LABELS.astype("u8") + 2**63), "must fit int64"),
    "a label without a class": (
        _npz(images=IMAGES, labels=LABELS, classes=["a", "b"]),
        "has the label 2, which is out",
    ),
    "equal ids": (_npz(images=IMAGES, labels=LABELS, ids=LABELS), "have the same id 0"),
    "classes of numbers": (_npz(images=IMAGES, labels=LABELS, classes=LABELS), "classes must be strings"),
    "no samples": (_npz(images=IMAGES[:0], labels=LABELS[:0]), "has no sample"),
    "an absurd shape": (
        _zip(images=_claimed((10**15, 28, 28)), labels=_npy(LABELS)),
        f"[{10**15}, 28, 28] takes {784 * 10**15} bytes, but 0 are stored",
    ),
    "a shape below zero": (_zip(images=_claimed((-1, -4), content=b"1234"), labels=_npy(LABELS)), "cannot be read"),
    "endless empty strings": (
        _zip(images=_npy(IMAGES), labels=_npy(LABELS), classes=_claimed((10**15,), "<U0")),
        "expected numbers or strings, found <U0",
    ),
    "a header without end": (
        _zip(images=_claimed((1,) * 9000), labels=_npy(LABELS)),
        "cannot be read as .npz (ValueError",
    ),
    "a header that is code": (
        _zip(images=b"\x93NUMPY\x01\x00\x20\x00__import__('os').mkdir('x')     \n", labels=_npy(LABELS)),
        "cannot be read as .npz",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_invalid_file_error_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "toy.npz").write_bytes(content)
    with pytest.raises(DataError) as raised:
        _load(tmp_path / "toy.npz")
    assert message in str(raised.value)
    assert "toy.npz" in str(raised.value)
    assert "\n" not in str(raised.value)


class _Trap:
    """Unpickling this makes a folder, which tells that code was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("key", ["images", "labels", "ids", "classes"])
def test_no_object_is_ever_unpickled(tmp_path: Path, key: str) -> None:
    trap = np.array([_Trap(tmp_path / "sprung")] * 12, dtype=object)
    (tmp_path / "toy.npz").write_bytes(_npz(**{"images": IMAGES, "labels": LABELS, key: trap}))
    with pytest.raises(DataError, match="objects are never unpickled"):
        _load(tmp_path / "toy.npz")
    assert not (tmp_path / "sprung").exists()


@given(st.data())
def test_damaged_bytes_raise_only_data_error(data: st.DataObject) -> None:
    content = bytearray(_npz(images=IMAGES[:6, :2, :2], labels=LABELS[:6]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "toy.npz").write_bytes(content)
        try:
            loaded = _load(Path(folder) / "toy.npz")
        except DataError as raised:
            assert "toy.npz" in str(raised)
        else:
            assert loaded.num_samples == 3


def test_missing_split_error_names_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(DataError) as raised:
        _load(tmp_path, "test")
    assert f"no file {tmp_path / 'test.npz'}" in str(raised.value)
    assert "data.root" in str(raised.value)


def test_labels_and_numbers_are_rows_of_targets(tmp_path: Path) -> None:
    labels = (np.arange(24).reshape(12, 2) % 3 == 0).astype(np.int64)
    labels[0] = -1
    np.savez(tmp_path / "toy.npz", images=IMAGES, labels=labels, classes=np.array(["hat", "scarf"]))
    config = DataConfig(name=f"npz:{tmp_path / 'toy.npz'}", task="multilabel", test_share=0.5)  # type: ignore[arg-type]
    train = load_dataset(config, "train")
    assert train.class_names == ("hat", "scarf") and train.targets is not None
    wanted = labels[train.sample_ids.numpy()].astype(np.float32)
    assert np.array_equal(train.targets.numpy(), np.where(wanted == -1, np.nan, wanted), equal_nan=True)
    assert train.labels.tolist() == [-1 if number == 0 else 0 for number in train.sample_ids.tolist()]


@pytest.mark.parametrize(
    ("task", "labels", "wanted"),
    [
        ("multilabel", np.full((12, 2), 2), "label 0 of the sample at position 0 is 2: .* 0 or 1"),
        ("regression", np.full((12, 1), np.inf), "must be finite"),
        ("regression", np.zeros((12, 2, 2)), r"must be numbers \[N, K\], found float64 \[12, 2, 2\]"),
        ("classification", np.zeros((12, 2)), 'set data.task = "multilabel"'),
    ],
)
def test_targets_that_do_not_fit_their_task_are_refused(tmp_path: Path, task: Any, labels: Any, wanted: str) -> None:
    np.savez(tmp_path / "toy.npz", images=IMAGES, labels=labels)
    with pytest.raises(DataError, match=wanted):
        load_dataset(DataConfig(name=f"npz:{tmp_path / 'toy.npz'}", task=task), "train")  # type: ignore[arg-type]
