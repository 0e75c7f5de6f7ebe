"""Joining a data set's samples to a store's rows, by id, and making sure that they are the same samples."""

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

from stages.class_map import SAME, ClassMap, ClassMapConfig, read_class_map
from stages.datasets.image_set import ImageSet, pixel_checksums
from stages.forms import Wanted
from stages.serving import Serving, arrays_read, serve
from store import FingerprintMismatch, StoreError, TargetStore

Missing = Literal["error", "hard-labels"]
"""What samples without targets are: an error, or taught by their labels alone."""


@dataclass(frozen=True)
class Source:
    """One store, the rows of the student's samples in it, int64 [N], and what is wanted of it.

    Samples that the store lacks, or of whose class the teacher knows nothing, have row -1. class_map: where the
    teacher's classes are not the data set's.
    """

    store: TargetStore
    rows: Tensor
    servings: tuple[Serving, ...]
    class_map: ClassMap | None = None

    @cached_property
    def names(self) -> list[str]:
        """The arrays that are read."""
        return arrays_read(self.store, [serving.wanted for serving in self.servings])


def join(
    store: TargetStore,
    image_set: ImageSet,
    wanted: Sequence[Wanted],
    missing: Missing = "error",
    classes: ClassMapConfig = SAME,
) -> Source:
    """Find the rows of `image_set`'s samples in `store`, by id, and check that they are the same samples.

    Raises StoreError for layers that the store lacks, and for samples that it lacks, unless they may be `missing` or
    the teacher has other classes; FingerprintMismatch for samples whose label or pixels are not those that the teacher
    saw; RecipeError for a map of classes that are not there.
    """
    class_map = read_class_map(store, image_set, classes)
    ids = image_set.sample_ids.numpy()
    at = store.samples.positions_of(ids)
    known = at >= 0
    if not known.all() and class_map is None:
        _require_may_be_missing(store, ids[~known], len(ids), missing)
    labels = store.samples.labels[at]
    if class_map is not None:
        labels = np.where(known, class_map.to_student(labels), -1)
        known = labels >= 0
        _require_some(store, at, known)
    rows = np.full(len(ids), -1, np.int64)
    rows[known] = store.rows_of(ids[known])
    held = store.samples.take(at[known])
    compared = image_set.take(torch.from_numpy(known.nonzero()[0])) if not known.all() else image_set
    _require_equal(store.path, compared, "label", labels[known], compared.labels.numpy())
    _require_equal(store.path, compared, "pixel checksum", held.pixels_crc32c, pixel_checksums(compared))
    return Source(store, torch.from_numpy(rows), tuple(serve(store, one) for one in wanted), class_map)


def _require_may_be_missing(store: TargetStore, absent: NDArray[np.int64], num_samples: int, missing: Missing) -> None:
    """Raise StoreError where the store may not lack the samples `absent`, or where it lacks them all."""
    some = f"{store.path} has no targets for {len(absent)} of the {num_samples} samples, such as {absent[:3].tolist()}"
    if len(absent) == num_samples:
        raise StoreError(f"{some}: it was made from another data set, or with other sample ids.")
    if missing == "error":
        raise StoreError(
            f"{some}: cache them with `kdpipe cache-teacher`, leave them out of the data set, or let them learn from "
            "their labels alone with student.missing_targets = 'hard-labels'."
        )


def _require_some(store: TargetStore, at: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
    """Raise StoreError where a teacher of other classes teaches none of the samples, which stand `at` positions in its
    store, -1 for those that it lacks.
    """
    if known.any():
        return
    if (at < 0).all():
        raise StoreError(
            f"{store.path} has no targets for any of the {len(at)} samples: it was made from another data set, or with "
            "other sample ids."
        )
    raise StoreError(
        f"{store.path} has none of the {len(at)} samples in a class that student.teachers.classes maps: its teacher "
        "has nothing to say of this data set."
    )


def _require_equal(path: Path, image_set: ImageSet, what: str, stored: NDArray[Any], wanted: NDArray[Any]) -> None:
    differ = np.flatnonzero(stored != wanted)
    if len(differ):
        pairs = [
            (f"{what} of sample {int(image_set.sample_ids[at])}", int(stored[at]), int(wanted[at])) for at in differ[:3]
        ]
        advice = (
            f"In all, {len(differ)} of {len(wanted)} samples differ: use the data set that the teacher saw, or cache "
            "again into another store."
        )
        raise FingerprintMismatch(f"the store {path}", pairs, advice)
