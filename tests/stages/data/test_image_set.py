from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kdpipe.stages.data.image_set import STD_FLOOR, ImageSet, digest, normalization, pixel_checksums
from kdpipe.stages.errors import DataError


def _image_set(**changes: Any) -> ImageSet:
    images = torch.arange(3 * 3 * 2 * 4, dtype=torch.uint8).reshape(3, 3, 2, 4)
    fields: dict[str, Any] = {
        "name": "toy",
        "split": "train",
        "images": images,
        "labels": torch.tensor([1, 0, 1]),
        "sample_ids": torch.tensor([7, 3, 2**62]),
        "class_names": ("cat", "dog"),
    }
    return ImageSet(**{**fields, **changes})


def test_image_set_sizes() -> None:
    image_set = _image_set()
    assert (image_set.num_samples, image_set.num_classes, image_set.in_channels) == (3, 2, 3)
    assert image_set.image_size == (2, 4)


def test_a_set_is_a_torch_dataset_of_pairs() -> None:
    found = _image_set()
    assert len(found) == found.num_samples
    assert found.classes == found.class_names
    images, labels = next(iter(DataLoader(found, batch_size=len(found))))  # type: ignore[arg-type]
    assert torch.equal(images, torch.as_tensor(found.images))
    assert torch.equal(labels, found.labels)
    assert len(list(found)) == len(found)  # type: ignore[call-overload]
    assert torch.equal(found[-1][0], images[-1])
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_set_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _image_set().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(0, 1, 2, 4, dtype=torch.uint8)}, "toy (train) has no sample"),
        ({"labels": torch.tensor([1, 2, 1])}, "sample 3 (position 1) has the label 2, which is outside 0..1"),
        ({"labels": torch.tensor([1, 1, -2])}, f"sample {2**62} (position 2) has the label -2, which is outside 0..1"),
        ({"sample_ids": torch.tensor([4, 9, -2])}, "position 2 has the id -2: ids must be >= 0"),
        ({"sample_ids": torch.tensor([5, 9, 5])}, "positions 0 and 2 have the same id 5"),
    ],
)
def test_invalid_set_error_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        _image_set(**changes)
    assert "\n" not in str(raised.value)


def test_the_digest_is_json_and_the_same_on_every_machine() -> None:
    written = digest(_image_set())
    assert json.loads(json.dumps(written)) == {
        "name": "toy",
        "split": "train",
        "num_samples": 3,
        "num_classes": 2,
        "ids_and_labels_sha256": hashlib.sha256(struct.pack("<6q", 3, 7, 2**62, 0, 1, 1)).hexdigest(),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": torch.tensor([1, 1, 1])},
        {"sample_ids": torch.tensor([7, 3, 4])},
    ],
    ids=["a label", "an id"],
)
def test_the_digest_sees_every_change(changes: dict[str, Any]) -> None:
    assert digest(_image_set(**changes))["ids_and_labels_sha256"] != digest(_image_set())["ids_and_labels_sha256"]


def test_the_same_samples_in_another_order_are_the_same_data_set() -> None:
    turned = _image_set(labels=torch.tensor([0, 1, 1]), sample_ids=torch.tensor([3, 7, 2**62]))
    assert digest(turned) == digest(_image_set())


def test_checksums_follow_the_sample_and_see_one_changed_pixel() -> None:
    whole = _image_set()
    images = whole.images.clone()
    images[1, 2, 1, 3] += 1
    before, after = pixel_checksums(whole), pixel_checksums(_image_set(images=images))
    assert before.dtype == np.uint32
    assert list(before == after) == [True, False, True]
    turned = _image_set(images=whole.images.flip(0))
    assert list(pixel_checksums(turned)) == list(before[::-1])


def test_the_checksum_is_crc32c() -> None:
    check_value = torch.tensor([list(b"123456789")] * 3, dtype=torch.uint8).reshape(3, 1, 3, 3)
    assert list(pixel_checksums(_image_set(images=check_value))) == [0xE3069283] * 3


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_normalisation_is_the_mean_and_std_of_each_channel(seed: int, channels: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (3, channels, 5, 4), dtype=np.uint8)
    mean, std = normalization(_image_set(images=torch.from_numpy(images)))
    scaled = images.astype(np.float64) / 255
    assert mean == pytest.approx(scaled.mean(axis=(0, 2, 3)), abs=5.1e-5)
    assert std == pytest.approx(scaled.std(axis=(0, 2, 3)), abs=5.1e-5)


def test_normalization_of_constant_images_is_finite() -> None:
    mean, std = normalization(_image_set(images=torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)))
    assert mean == (1.0,)
    assert std == (round(STD_FLOOR, 4),)
