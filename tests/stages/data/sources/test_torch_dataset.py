from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_tensor

from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.image_set import ImageSet, pixel_checksums
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.data.sources.torch_dataset import image_set_from_dataset
from kdpipe.stages.errors import DataError

PIXELS = torch.randint(256, (6, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PIXELS[:, 0, 0, 0] = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


class Pairs(Dataset[Any]):
    """Samples of PIXELS, changed by `image` and `label`."""

    def __init__(
        self,
        image: Callable[[Image.Image], Any] = lambda image: image,
        label: Callable[[int], Any] = lambda label: label,
        num_samples: int = 6,
    ) -> None:
        self.image, self.label, self.num_samples = image, label, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(PIXELS[index].permute(1, 2, 0).numpy())
        return self.image(image), self.label(LABELS[index])


class Named(Pairs):
    classes = ("cat", "dog", "ox", "hen")


class Dictionaries(Pairs):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"image": image, "path": "x", **label}


def read(dataset: Any, **arguments: Any) -> ImageSet:
    return image_set_from_dataset(dataset, name="own", split="train", **arguments)


def to_scaled(dtype: torch.dtype) -> Callable[[Image.Image], torch.Tensor]:
    return v2.Compose([v2.ToImage(), v2.ToDtype(dtype, scale=True)])


@pytest.mark.parametrize(
    "image",
    [
        lambda image: image,
        np.asarray,
        pil_to_tensor,
        v2.ToImage(),
        to_tensor,
        to_scaled(torch.float32),
        to_scaled(torch.float64),
        lambda image: to_tensor(image).numpy().transpose(1, 2, 0),
    ],
    ids=["PIL", "numpy", "uint8", "tv_tensor", "ToTensor", "float32", "float64", "float numpy"],
)
def test_all_forms_of_images_give_equal_pixels(image: Callable[[Any], Any]) -> None:
    found = read(Pairs(image))
    assert isinstance(found.images, torch.Tensor)
    assert torch.equal(found.images, PIXELS)
    assert found.labels.tolist() == LABELS
    assert found.sample_ids.tolist() == list(range(6))
    assert (found.name, found.split, found.class_names) == ("own", "train", ("0", "1", "2"))


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)]
)
def test_modes_of_pil_images_are_converted(mode: str, channels: int) -> None:
    assert read(Pairs(lambda image: image.convert(mode))).in_channels == channels


@pytest.mark.parametrize("image", [lambda image: np.asarray(image)[..., 0], lambda image: pil_to_tensor(image)[0]])
def test_two_axes_are_a_gray_image(image: Callable[[Any], Any]) -> None:
    found = read(Pairs(image))
    assert isinstance(found.images, torch.Tensor)
    assert torch.equal(found.images, PIXELS[:, :1])


@pytest.mark.parametrize("kind", [np.int32, torch.tensor, np.array, lambda label: np.array([label])])
def test_integers_of_all_kinds_are_labels(kind: Callable[[int], Any]) -> None:
    assert read(Pairs(label=kind)).labels.tolist() == LABELS


def test_dictionaries_of_an_image_and_an_integer() -> None:
    assert read(Dictionaries(label=lambda label: {"label": label})).labels.tolist() == LABELS


def test_a_tensor_dataset_is_read() -> None:
    assert torch.equal(torch.as_tensor(read(TensorDataset(PIXELS, torch.tensor(LABELS))).images), PIXELS)


def test_subsets_keep_ids_and_classes() -> None:
    found = read(Subset(Subset(Named(), [5, 4, 3]), [2, 0]))
    assert found.sample_ids.tolist() == [3, 5]
    assert found.labels.tolist() == [0, 2]
    assert found.class_names == Named.classes


def test_concatenated_sets_have_one_list_of_classes() -> None:
    found = read(ConcatDataset([Named(), Named()]))
    assert found.sample_ids.tolist() == list(range(12))
    assert found.class_names == Named.classes
    with pytest.raises(DataError, match="its parts have different classes: give class_names"):
        read(ConcatDataset([Named(), Pairs()]))


def test_classes_and_ids_can_be_given() -> None:
    found = read(Named(), class_names=["x", "y", "z"], sample_ids=[9, 8, 7, 6, 5, 4])
    assert found.class_names == ("x", "y", "z")
    assert found.sample_ids.tolist() == [9, 8, 7, 6, 5, 4]


class Unequal(Pairs):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image.resize((8, 8 + index // 5)), label


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unequal_and_large_sets_are_read_on_access(num_workers: int) -> None:
    found = read(Unequal(), num_workers=num_workers)
    assert isinstance(found.images, ImageFiles) and (found.in_channels, found.image_size) == (3, None)
    assert found.images.shapes.tolist() == [[8, 8]] * 5 + [[9, 8]]
    assert read(Unequal(), image_size=4).image_size == (4, 4)
    large = read(Named(), max_bytes=PIXELS.numel() - 1, num_workers=num_workers)
    assert not large.in_memory and (large.labels.tolist(), large.image_size) == (LABELS, (5, 4))
    assert np.array_equal(pixel_checksums(large), pixel_checksums(read(Named(), max_bytes=PIXELS.numel())))
    some = large.take(torch.tensor([4, 1]))
    loaded = ImageLoader(some, torch.device("cpu"), num_workers=num_workers).get(ViewRequest(torch.tensor([0, 1])))
    assert torch.equal(loaded.images, PIXELS[[4, 1]])


def test_sample_that_changes_or_fails_later_is_named() -> None:
    dataset = Pairs()
    large = read(dataset, max_bytes=0, num_workers=0)
    dataset.image = lambda image: image.rotate(180)
    with pytest.raises(DataError, match="data set own, sample 2 changed since the data set was first read"):
        large.read(2)
    failing = Pairs(num_samples=7)
    with pytest.raises(DataError, match="data set own: sample 6 cannot be read .IndexError"):
        read(failing, max_bytes=0, num_workers=1)


def test_mixed_gray_and_color_needs_channels() -> None:
    class Mixed(Pairs):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image.convert("L" if index == 3 else "RGB"), label

    with pytest.raises(DataError, match="image 0 has 3 channels, image 3 has 1: give channels = 1 or 3"):
        read(Mixed())
    assert read(Mixed(), channels=3).in_channels == 3


def test_labels_without_a_zero_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="1 of 4 classes have no sample: '0'. Labels .* start at 1: subtract 1"):
        found = read(Pairs(label=lambda label: label + 1))
    assert found.num_classes == 4


@pytest.mark.parametrize(
    "transform",
    [v2.RandomHorizontalFlip(), v2.RandomErasing(p=0.2), v2.Lambda(lambda image: image + random.randint(0, 1))],
    ids=["flip", "rare", "Lambda"],
)
def test_a_random_transform_is_refused(transform: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    with pytest.raises(DataError, match="differs when it is read again, so its transform is random: remove it"):
        read(Pairs(lambda image: transform(pil_to_tensor(image)), num_samples=2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (v2.Compose([to_tensor, v2.Normalize([0.5], [0.5])]), "float32 numbers, from -1 to 0.992"),
        (
            lambda image: to_tensor(image).sqrt(),
            "float32 numbers that are no multiples of 1/255, from 0 to 0.998: hand",
        ),
        (lambda image: to_tensor(image) * float("nan"), "float32 numbers, from nan to nan"),
        (lambda image: to_tensor(image).half(), "the image is float16: hand raw images"),
        (lambda image: pil_to_tensor(image).long(), "the image is int64"),
        (lambda image: pil_to_tensor(image).permute(1, 2, 0), "Tensor [5, 4, 3], wanted [C, H, W], C 1 or 3, or"),
        (lambda image: np.asarray(image).transpose(2, 0, 1), "ndarray [3, 5, 4], wanted [H, W, C], C 1 or 3"),
        (lambda image: image.convert("I"), "mode I has more than 8 bits a channel"),
        (lambda image: "cat.png", "the image is of type str"),
        (lambda image: np.zeros((0, 4, 3), np.uint8), "ndarray [0, 4, 3]"),
    ],
)
def test_other_images_are_refused(image: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        read(Pairs(image))
    assert message in str(raised.value)
    assert str(raised.value).startswith("data set own, sample 0: ")


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (float, "float 0.0"),
        (str, "str '0'"),
        (lambda label: torch.eye(3)[label], "float32 [3]"),
        (lambda label: torch.eye(3, dtype=torch.int64)[label], "of a one-hot row, its argmax, found int64 [3]"),
    ],
)
def test_other_labels_are_refused(label: Callable[[int], Any], found: str) -> None:
    with pytest.raises(DataError, match="sample 0: the label must be one integer") as raised:
        read(Pairs(label=label))
    assert found in str(raised.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dictionaries(label=lambda label: {"fine": label, "coarse": 0}), "found dict of Image, str, int, int, wanted"),
        ([(1, 2, 3)], "sample 0: found tuple of int, int, int, wanted (image, label)"),
        ([5], "sample 0: found int, wanted (image, label)"),
        (Pairs(num_samples=0), "data set own has no samples"),
        (Pairs(num_samples=7), "sample 6 cannot be read (IndexError"),
        (Pairs(label=lambda label: label - 2), "has the label -2"),
    ],
)
def test_other_samples_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        read(dataset)
    assert message in str(raised.value)


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any: ...

    for dataset in (Stream(), DataLoader(Pairs()), iter([])):
        with pytest.raises(DataError, match=f"{type(dataset).__name__} cannot be read by index, which caching needs"):
            read(dataset)


def test_a_label_of_none_is_an_unlabeled_image() -> None:
    dataset = Pairs(label=lambda label: label or None)
    with pytest.warns(UserWarning, match="2 of 6 samples have no label"):
        assert read(dataset, class_names=["a", "b", "c"]).labels.tolist() == [-1, 1, 2, -1, 1, 2]
