"""Load the partners of MixUp and CutMix: the samples that a store was created with.

Partners come from a fixed pool of samples, so that extending a store keeps its views, and a student on part of the data
set sees the same mixtures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kdpipe.stages.data.image_set import ImageSet, pixel_checksums
from kdpipe.stages.data.labeling import hide_labels
from kdpipe.stages.errors import DataError
from kdpipe.store import FingerprintMismatch, Samples, read_samples, read_store_manifest


def read_partner_pool(path: Path) -> Samples:
    """Read the samples that the store at `path` was created with, by ascending id."""
    manifest = read_store_manifest(path)
    samples = read_samples(path, manifest.layout, manifest.identity.data)
    return samples.take(np.argsort(samples.ids[: manifest.layout.segments[0]]))


def find_partners(path: Path, image_set: ImageSet, whole: ImageSet | None = None) -> ImageSet | None:
    """Return the images that the views of the store at `path` are mixed with; None if these are `image_set`.

    They are looked for in `whole`, by default in `image_set`. Raises as `load_partner_pool` does.
    """
    pool = read_partner_pool(path)
    if np.array_equal(pool.ids, np.sort(image_set.sample_ids.numpy())):
        return None
    return hide_labels(load_partner_pool(pool, whole or image_set, path), image_set)


def load_partner_pool(pool: Samples, image_set: ImageSet, path: Path) -> ImageSet:
    """Find the samples of `pool`, the partner pool of the store at `path`, in `image_set` by their ids.

    Raises:
        DataError: The data set lacks some of the samples.
        FingerprintMismatch: The label or pixels of a sample differ from those that the teacher saw.
    """
    ids, order = torch.sort(image_set.sample_ids)
    required = torch.from_numpy(pool.ids)
    indices = torch.searchsorted(ids, required).clamp(max=len(ids) - 1)
    absent = required[ids[indices] != required]
    if len(absent):
        raise DataError(
            f"{path} mixes images with samples that data set {image_set.name} lacks: {len(absent)} of "
            f"{len(required)}, such as {absent[:3].tolist()}: restore the images, or cache without [views.mix]."
        )
    found = image_set.take(order[indices])
    _check_unchanged(pool, found, path)
    return found


def _check_unchanged(pool: Samples, found: ImageSet, path: Path) -> None:
    columns = (
        ("label", pool.labels, found.listed_labels.numpy()),
        ("pixel checksum", pool.pixels_crc32c, pixel_checksums(found)),
    )
    for what, stored, found_values in columns:
        differ = np.flatnonzero(stored != found_values)
        if len(differ):
            pairs = [
                (f"{what} of partner {pool.ids[index]}", int(stored[index]), int(found_values[index]))
                for index in differ[:3]
            ]
            advice = (
                f"In all, {len(differ)} of the {len(stored)} partners differ: use the data set that the teacher saw, "
                "or cache again into another store."
            )
            raise FingerprintMismatch(f"the store {path}", pairs, advice)
