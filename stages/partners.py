"""With whom MixUp and CutMix mix: the samples with which a store began.

Partners are part of the pictures that the teacher saw. They come from a fixed population of samples, so that a store
that grows keeps the pictures that it has, and a student on a part of the data set sees the same mixtures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.datasets.image_set import ImageSet
from stages.errors import DataError
from store import read_samples, read_store_manifest


def population_of(path: Path) -> Tensor:
    """The ids of the samples with which the store at `path` began, int64 [P], ascending."""
    manifest = read_store_manifest(path)
    samples = read_samples(path, manifest.geometry, manifest.identity.data)
    return torch.sort(torch.from_numpy(samples.ids[: manifest.geometry.segments[0]].copy())).values


def find_partners(population: Tensor, image_set: ImageSet, path: Path) -> ImageSet:
    """The samples of `population`, int64 [P], found in `image_set` by their ids.

    Raises DataError for samples of the store at `path` that the data set lacks.
    """
    ids, order = torch.sort(image_set.sample_ids)
    at = torch.searchsorted(ids, population).clamp(max=len(ids) - 1)
    absent = population[ids[at] != population]
    if len(absent):
        raise DataError(
            f"{path} mixes pictures with those of samples that data set {image_set.name} lacks: {len(absent)} of "
            f"{len(population)}, such as {absent[:3].tolist()}: bring back the images, or cache without [views.mix]."
        )
    return image_set.take(order[at])
