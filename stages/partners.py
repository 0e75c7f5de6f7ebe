"""With whom MixUp and CutMix mix: the samples with which a store began.

Partners are part of the pictures that the teacher saw. They come from a fixed population of samples, so that a store
that grows keeps the pictures that it has, and a student on a part of the data set sees the same mixtures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stages.datasets.image_set import ImageSet, pixel_checksums
from stages.errors import DataError
from store import FingerprintMismatch, Samples, read_samples, read_store_manifest


def population_of(path: Path) -> Samples:
    """The samples with which the store at `path` began, by ascending id. Raises StoreError where it is damaged."""
    manifest = read_store_manifest(path)
    samples = read_samples(path, manifest.layout, manifest.identity.data)
    return samples.take(np.argsort(samples.ids[: manifest.layout.segments[0]]))


def find_partners(population: Samples, image_set: ImageSet, path: Path) -> ImageSet:
    """The samples of `population`, with which the store at `path` began, found in `image_set` by their ids.

    Raises DataError for samples that the data set lacks, FingerprintMismatch for those whose label or pixels are not
    those that the teacher saw: they are in other samples' pictures.
    """
    ids, order = torch.sort(image_set.sample_ids)
    wanted = torch.from_numpy(population.ids)
    at = torch.searchsorted(ids, wanted).clamp(max=len(ids) - 1)
    absent = wanted[ids[at] != wanted]
    if len(absent):
        raise DataError(
            f"{path} mixes pictures with those of samples that data set {image_set.name} lacks: {len(absent)} of "
            f"{len(wanted)}, such as {absent[:3].tolist()}: bring back the images, or cache without [views.mix]."
        )
    found = image_set.take(order[at])
    _require_the_same(population, found, path)
    return found


def _require_the_same(population: Samples, found: ImageSet, path: Path) -> None:
    columns = (
        ("label", population.labels, found.labels.numpy()),
        ("pixel checksum", population.pixels_crc32c, pixel_checksums(found)),
    )
    for what, stored, wanted in columns:
        differ = np.flatnonzero(stored != wanted)
        if len(differ):
            pairs = [(f"{what} of partner {population.ids[at]}", int(stored[at]), int(wanted[at])) for at in differ[:3]]
            advice = (
                f"In all, {len(differ)} of the {len(stored)} samples that are mixed into others differ: use the data "
                "set that the teacher saw, or cache again into another store."
            )
            raise FingerprintMismatch(f"the store {path}", pairs, advice)
