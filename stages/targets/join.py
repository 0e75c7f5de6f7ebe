"""Join a data set's samples to a store's rows by id, and check that they are the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.data.image_set import ImageSet, pixel_checksums
from kdpipe.stages.targets.class_map import SAME, ClassMap, ClassMapConfig, read_class_map
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.resolve import FeatureSource, arrays_needed, resolve_feature
from kdpipe.store import FingerprintMismatch, StoreError, TargetStore

Missing = Literal["error", "hard-labels"]
"""Handling of samples without targets: an error, or trained with their labels alone."""


@dataclass(frozen=True)
class JoinedStore:
    """A store joined to a data set of N samples.

    Attributes:
        store: The opened store.
        rows: The row of each sample, int64 [N]; -1 if the store or the teacher's classes lack it.
        features: The sources of the required features.
        class_map: The map of the teacher's classes, if they are not the data set's.
    """

    store: TargetStore
    rows: Tensor
    features: tuple[FeatureSource, ...]
    class_map: ClassMap | None = None

    @cached_property
    def names(self) -> list[str]:
        """Return the names of the arrays to read."""
        return arrays_needed(self.store, [source.feature for source in self.features])


def join(
    store: TargetStore,
    image_set: ImageSet,
    features: Sequence[FeatureSpec],
    missing: Missing = "error",
    classes: ClassMapConfig = SAME,
) -> JoinedStore:
    """Find the rows of the student's samples in a store, by id, and check that they are the same samples.

    Raises:
        StoreError: The store lacks required features, or samples that may not be missing.
        FingerprintMismatch: The label or the pixels of a sample differ from those that the teacher saw.
        RecipeError: The class map has a class that does not exist.
    """
    class_map = read_class_map(store, image_set, classes)
    ids = image_set.sample_ids.numpy()
    positions = store.samples.positions_of(ids)
    known = positions >= 0
    if class_map is None:
        _require_samples(store, ids[~known], len(ids), missing)
    labels = store.samples.labels[positions]
    if class_map is not None:
        if not known.any():
            _require_samples(store, ids, len(ids), missing)
        unlabeled = labels < 0
        labels = np.where(unlabeled, labels, class_map.to_student(labels))
        known &= unlabeled | (labels >= 0)
        if not known.any():
            raise StoreError(
                f"{store.path} has none of the {len(ids)} samples in a class that student.teachers.classes maps: check "
                "the map, or use a teacher of this data set's classes."
            )
    rows = np.full(len(ids), -1, np.int64)
    rows[known] = store.rows_of(ids[known])
    stored = store.samples.take(positions[known])
    compared = image_set.take(torch.from_numpy(known.nonzero()[0])) if not known.all() else image_set
    _require_equal(store.path, compared, "label", labels[known], compared.listed_labels.numpy())
    _require_equal(store.path, compared, "pixel checksum", stored.pixels_crc32c, pixel_checksums(compared))
    sources = tuple(resolve_feature(store, feature) for feature in features)
    return JoinedStore(store, torch.from_numpy(rows), sources, class_map)


def _require_samples(store: TargetStore, absent: NDArray[np.int64], num_samples: int, missing: Missing) -> None:
    """Raise StoreError if the samples `absent` may not be missing, or if these are all samples."""
    some = f"{store.path} has no targets for {len(absent)} of the {num_samples} samples, such as {absent[:3].tolist()}"
    if len(absent) == num_samples:
        raise StoreError(f"{some}: it was made from another data set or with other sample ids.")
    if len(absent) and missing == "error":
        raise StoreError(
            f"{some}: cache them with `kdpipe cache-teacher`, remove them from the data set, or train on their labels "
            "alone with student.missing_targets = 'hard-labels'."
        )


def _require_equal(path: Path, image_set: ImageSet, what: str, stored: NDArray[Any], actual: NDArray[Any]) -> None:
    differ = np.flatnonzero(stored != actual)
    if len(differ):
        pairs = [
            (f"{what} of sample {int(image_set.sample_ids[index])}", int(stored[index]), int(actual[index]))
            for index in differ[:3]
        ]
        advice = (
            f"In total, {len(differ)} of {len(actual)} samples differ: use the data set that the teacher saw, or cache "
            "into another store."
        )
        raise FingerprintMismatch(f"the store {path}", pairs, advice)
