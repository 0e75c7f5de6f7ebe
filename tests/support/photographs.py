"""Photographs in files, small enough for tests: noise in PNG, whose pixels are known before they are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFiles, pixel_checksum
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.image_source import FilePaths

EQUAL = ((12, 10),)
UNEQUAL = ((12, 10), (9, 14), (16, 16))
"""(H, W), taken in turn."""


def noise(num_samples: int, sizes: tuple[tuple[int, int], ...], seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """Return random images, uint8 [3, H, W]."""
    generator = np.random.default_rng(seed)
    shapes = (sizes[index % len(sizes)] for index in range(num_samples))
    return [generator.integers(256, size=(3, *shape), dtype=np.uint8) for shape in shapes]


def photographs(folder: Path, num_samples: int, sizes: tuple[tuple[int, int], ...] = EQUAL, seed: int = 0) -> ImageSet:
    """Write `noise` to files, as a data set of 4 classes whose ids are neither positions nor in order."""
    folder.mkdir(parents=True, exist_ok=True)
    images = noise(num_samples, sizes, seed)
    paths = [folder / f"{index}.png" for index in range(num_samples)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    generator = torch.Generator().manual_seed(seed)
    files = ImageFiles(
        FilePaths.pack(paths),
        DecodeSpec(channels=3),
        np.array([pixel_checksum(image) for image in images], dtype=np.uint32),
        np.array([image.shape[1:] for image in images], dtype=np.int32),
    )
    ids = torch.randperm(10 * num_samples, generator=generator)[:num_samples]
    labels = torch.randint(4, (num_samples,), generator=generator)
    return ImageSet("photographs", "train", files, labels, ids, tuple("abcd"))


def in_memory(image_set: ImageSet) -> ImageSet:
    """Return the same samples with their pixels in memory; the images must have one size."""
    pixels = [image_set.read(index) for index in range(image_set.num_samples)]
    return replace(image_set, images=torch.from_numpy(np.stack(pixels)))


def path_of(image_set: ImageSet, index: int) -> Path:
    assert isinstance(image_set.images, ImageFiles)
    return Path(image_set.images.source.where(index))
