from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.stages.data import decode as pixels
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet, digest
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources.torch_dataset import image_set_from_dataset
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError, RecipeError


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, Any]:
    """40 random RGB images of 6 x 8 in 4 classes, as one .npz: the keys of a DataConfig."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "toy.npz", images=images, labels=np.arange(40) % 4)
    return {"name": "npz:toy.npz", "root": str(tmp_path)}


def test_digits_come_as_grey_bytes_with_a_fixed_split() -> None:
    train, test = (load_dataset(DataConfig(), split) for split in ("train", "test"))
    assert (train.name, train.split, test.split) == ("digits", "train", "test")
    assert train.images.shape == (1438, 1, 8, 8) and test.images.shape == (359, 1, 8, 8)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert sorted([*train.sample_ids.tolist(), *test.sample_ids.tolist()]) == list(range(1797))
    assert train.class_names == tuple("0123456789")


def test_the_digits_split_never_changes() -> None:
    # A store made from the digits years ago must still be recognized.
    shas = [digest(load_dataset(DataConfig(), split))["ids_and_labels_sha256"][:16] for split in ("train", "test")]
    assert shas == ["ed71d68378d2f3a8", "7802f3433e07e846"]


def test_digits_keep_scikit_learns_order_and_levels() -> None:
    from sklearn.datasets import load_digits

    test = load_dataset(DataConfig(), "test")
    expected = load_digits()
    at = test.sample_ids.numpy()
    assert np.array_equal(test.labels.numpy(), expected.target[at])
    assert np.allclose(test.images[:, 0].numpy(), expected.images[at] * 255 / 16, atol=0.5)


def test_test_share_decides_the_size_of_the_test_split() -> None:
    assert load_dataset(DataConfig(test_share=0.5), "test").num_samples == pytest.approx(1797 / 2, abs=10)


def test_num_train_subsets_only_the_training_split(toy: dict[str, Any]) -> None:
    full, part = (load_dataset(DataConfig(**toy, num_train=count), "train") for count in (None, 8))
    assert torch.bincount(part.labels).tolist() == [2, 2, 2, 2]
    rows = [full.sample_ids.tolist().index(each) for each in part.sample_ids.tolist()]
    assert torch.equal(part.images, full.images[rows])
    assert part.num_classes == full.num_classes
    assert load_dataset(DataConfig(**toy, num_train=8), "test").num_samples == 8


def test_num_train_beyond_the_split_is_refused(toy: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="subset of 33 samples: the split has 32"):
        load_dataset(DataConfig(**toy, num_train=33), "train")


def test_channels_and_size_change_the_pixels_and_nothing_else(toy: dict[str, Any]) -> None:
    plain = load_dataset(DataConfig(**toy), "train")
    small = load_dataset(DataConfig(**toy, channels=1, image_size=4), "train")
    assert (plain.in_channels, plain.image_size) == (3, (6, 8))
    assert (small.in_channels, small.image_size) == (1, (4, 4))
    assert digest(plain) == digest(small)


def test_loading_twice_gives_the_same_bits(toy: dict[str, Any]) -> None:
    first, second = (load_dataset(DataConfig(**toy, image_size=5), "train") for _ in range(2))
    assert torch.equal(first.images, second.images)


def test_size_argument_overrides_the_recipe(toy: dict[str, Any]) -> None:
    recipe = DataConfig(**toy, image_size=4)
    assert load_dataset(recipe, "train", size=5).image_size == (5, 5)
    assert load_dataset(recipe, "train").image_size == (4, 4)


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_keep_their_samples_and_nothing_else_changes(toy: dict[str, Any], split: Split) -> None:
    full, part = (load_dataset(DataConfig(**toy, classes=classes), split) for classes in (None, ("3", "1")))
    rows = ((full.labels == 1) | (full.labels == 3)).nonzero()[:, 0]
    assert 0 < len(rows) < full.num_samples
    assert torch.equal(part.sample_ids, full.sample_ids[rows])
    assert torch.equal(part.labels, full.labels[rows])
    assert torch.equal(part.images, full.images[rows])
    assert part.class_names == full.class_names


def test_num_train_applies_after_classes(toy: dict[str, Any]) -> None:
    part = load_dataset(DataConfig(**toy, classes=("3", "1"), num_train=8), "train")
    assert torch.bincount(part.labels).tolist() == [0, 4, 0, 4]
    with pytest.raises(DataError, match="subset of 17 samples: the split has 16"):
        load_dataset(DataConfig(**toy, classes=("3", "1"), num_train=17), "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_unknown_class_error_has_the_nearest(tmp_path: Path, split: Split) -> None:
    images, labels = np.zeros((4, 2, 2), dtype=np.uint8), np.array([0, 0, 1, 1])
    np.savez(tmp_path / "pets.npz", images=images, labels=labels, classes=np.array(["tabby", "terrier"]))
    config = {"name": f"npz:{tmp_path / 'pets.npz'}"}
    with pytest.raises(RecipeError, match="npz:pets.npz has no class 'terier': did you mean 'terrier'"):
        load_dataset(DataConfig(**config, classes=("tabby", "terier")), split)
    with pytest.raises(RecipeError, match="no class 'zzz': its classes are tabby, terrier."):
        load_dataset(DataConfig(**config, classes=("zzz",)), split)


def test_classes_without_a_sample_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 2, 2), dtype=np.uint8), np.array([0, 0, 0, 2])
    np.savez(tmp_path / "pets.npz", images=images, labels=labels)
    config = DataConfig(name=f"npz:{tmp_path / 'pets.npz'}", classes=("1", "2"))
    assert load_dataset(config, "train").labels.tolist() == [2]
    with pytest.raises(DataError, match=r"pets.npz \(test\) has no samples of the classes in data.classes"):
        load_dataset(config, "test")


def test_a_test_crop_is_for_photographs(toy: dict[str, Any]) -> None:
    for config in (DataConfig(test_crop=0.875), DataConfig(**toy, image_size=4, test_crop=0.875)):
        with pytest.raises(RecipeError, match="data.test_crop applies only to imagefolder, table"):
            load_dataset(config, "test")


def test_arrays_stay_in_memory_regardless_of_size(toy: dict[str, Any]) -> None:
    train = load_dataset(DataConfig(**toy, cache_bytes=0), "train")
    assert train.in_memory and train.dropped == ()
    assert np.array_equal(train.read(3), train.images[3].numpy())


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mnist", "did you mean 'MNIST'"),
        ("cifar-100", "did you mean 'CIFAR100'"),
        ("Digits", "did you mean 'digits'"),
        ("image_folder:/data/pets", "did you mean 'imagefolder:PATH'"),
        ("npz", "did you mean 'npz:PATH'"),
        ("imagefolder:", "did you mean 'imagefolder:PATH'"),
        ("completely different", "known names: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, imagefolder:PATH"),
    ],
)
def test_unknown_name_error_has_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset(DataConfig(name=name), "train")
    assert suggestion in str(raised.value)
    assert f"data.name={name!r}" in str(raised.value)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="unknown split 'val': expected 'train', 'validation' or 'test'"):
        load_dataset(DataConfig(), "val")  # type: ignore[arg-type]


def test_a_tilde_is_expanded_and_never_reaches_provenance(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    below_root = DataConfig(name="npz:toy.npz", root=f"~/{tmp_path.name}")
    for config in (below_root, DataConfig(name=f"npz:~/{tmp_path.name}/toy.npz")):
        written = digest(load_dataset(config, "train"))
        assert written["name"] == "npz:toy.npz"
        assert str(tmp_path) not in str(written)


def test_unknown_home_folder_is_an_error() -> None:
    with pytest.raises(DataError, match="no file .*~no-such-user-here"):
        load_dataset(DataConfig(name="npz:~no-such-user-here/toy.npz"), "train")


def test_images_larger_than_memory_are_rejected(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "installed_bytes", lambda: 2**20)
    with pytest.raises(DataError, match=r"data set npz:toy.npz needs 0\.\d GiB of memory.*data.image_size"):
        load_dataset(DataConfig(**toy, image_size=1000), "train")


@pytest.mark.parametrize(
    "keys",
    [
        {"nmae": "digits"},
        {"channels": 2},
        {"image_size": 0},
        {"num_train": 0},
        {"test_share": 0.0},
        {"test_share": 1.0},
        {"download": "yes"},
        {"test_crop": 0.0},
        {"test_crop": 1.1},
        {"classes": ()},
        {"cache_bytes": -1},
        {"unreadable": "ignore"},
        {"num_workers": -1},
    ],
)
def test_a_wrong_key_or_value_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        DataConfig(**keys)


def test_validation_share_is_cut_from_the_training_images(toy: dict[str, Any]) -> None:
    whole = load_dataset(DataConfig(**toy, num_train=32), "train")
    config = DataConfig(**toy, num_train=32, validation_share=0.25)
    train, validation, test = (load_dataset(config, part) for part in ("train", "validation", "test"))
    assert torch.bincount(validation.labels).tolist() == [2, 2, 2, 2]
    assert sorted([*train.sample_ids.tolist(), *validation.sample_ids.tolist()]) == sorted(whole.sample_ids.tolist())
    assert digest(test) == digest(load_dataset(DataConfig(**toy), "test"))
    assert validation.split == "validation"
    with pytest.raises(RecipeError, match="data.validation_share"):
        load_dataset(DataConfig(**toy), "validation")


def test_validation_images_lose_their_labels_only_with_all(toy: dict[str, Any]) -> None:
    for labels, num_train, num_validation in (("all", 20, 12), (5, 5, 12), ("none", 0, 0)):
        config = DataConfig(**toy, labels=labels, validation_share=1 / 3)
        train, validation, test = (load_dataset(config, part) for part in ("train", "validation", "test"))
        assert [len(one.labeled) for one in (train, validation)] == [num_train, num_validation]
        assert test.is_labeled


@pytest.mark.parametrize("kind", ["npz", "torch"])
def test_labels_that_count_from_minus_one_are_refused(tmp_path: Path, kind: str) -> None:
    def load(found: np.ndarray, **keys: Any) -> ImageSet:
        images = np.zeros((len(found), 4, 4), np.uint8)
        if kind == "torch":
            if "labels" in keys:
                keys = {"class_names": ["a", "b", "c"]}
            pairs = torch.utils.data.TensorDataset(torch.from_numpy(images)[:, None], torch.from_numpy(found))
            return image_set_from_dataset(pairs, name="a", split="train", **keys)
        np.savez(tmp_path / "a.npz", images=images, labels=found)
        return load_dataset(DataConfig(name=f"npz:{tmp_path}/a.npz", test_share=0.1, **keys), "train")

    shifted = np.arange(40) % 4 - 1
    with pytest.raises(DataError, match="have the label -1, about as many as a class has. If the labels count from -1"):
        load(shifted)
    assert load(shifted, labels=8).has_labels  # unlabeled samples that are meant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load(np.repeat([-1, 0, 1], [60, 10, 10])).has_labels
    assert load(np.arange(40) % 4).is_labeled


def test_a_set_without_labels_must_be_meant(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((10, 4, 4), np.uint8), labels=np.full(10, -1))
    with pytest.raises(DataError, match="its classes are not known"):
        load_dataset(DataConfig(name=f"npz:{tmp_path}/a.npz"), "train")
    with pytest.raises(DataError, match="no training sample of npz:a.npz has a label: set data.labels = 'none'"):
        load_dataset(DataConfig(name=f"npz:{tmp_path}/a.npz", classes=("a", "b")), "train")
