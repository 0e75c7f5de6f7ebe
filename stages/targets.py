"""What the stores say about a batch: rows joined by sample id, resident on the device or in RAM, or memory-mapped.

The teacher is never loaded: all that is read here was written by `cache-teacher`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.datasets.image_set import ImageSet, pixel_checksums
from stages.features import Outputs
from store import FingerprintMismatch, StoreError, TargetStore

LOGITS = "logits"


def feature_array(layer: str) -> str:
    """The name of the array that holds a layer's feature maps."""
    return f"features/{layer}"


@dataclass(frozen=True)
class Source:
    """One store, the rows of the student's samples in it, and the layers wanted of it."""

    store: TargetStore
    rows: Tensor
    layers: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [LOGITS, *map(feature_array, self.layers)]

    @property
    def num_bytes(self) -> int:
        """What all views of the wanted arrays take in memory."""
        rows = self.store.num_views * self.store.num_samples
        return rows * sum(self.store.spec(name).row_bytes for name in self.names)


class Targets:
    """The targets of a student's samples from one or several stores."""

    def __init__(self, sources: Sequence[Source], device: torch.device) -> None:
        self._sources = tuple(sources)
        self._device = device
        self.residence = _residence(sum(source.num_bytes for source in sources), device)
        self._slabs: dict[tuple[int, str, int], Tensor] = {}

    def batch(self, view: int, indices: Tensor) -> list[Outputs]:
        """What each store says about the samples at `indices`, int64 [B], in `view`: float32 tensors on the device."""
        return [self._outputs(number, view, indices) for number in range(len(self._sources))]

    def _outputs(self, number: int, view: int, indices: Tensor) -> Outputs:
        source = self._sources[number]
        rows = source.rows[indices]
        read = {name: self._rows(number, name, view, rows) for name in source.names}
        return Outputs(read[LOGITS], {layer: read[feature_array(layer)] for layer in source.layers})

    def _rows(self, number: int, name: str, view: int, rows: Tensor) -> Tensor:
        if self.residence == "mapped":
            gathered = torch.from_numpy(self._sources[number].store.gather(name, view, rows.numpy()))
            return gathered.to(self._device, non_blocking=True).float()
        slab = self._slab(number, name, view)
        return slab.index_select(0, rows.to(slab.device)).to(self._device, non_blocking=True).float()

    def _slab(self, number: int, name: str, view: int) -> Tensor:
        """One view of an array, read whole and checked the first time that it is asked for."""
        key = (number, name, view)
        if key not in self._slabs:
            slab = torch.from_numpy(self._sources[number].store.read_view(name, view))
            self._slabs[key] = slab.to(self._device) if self.residence == "device" else slab
        return self._slabs[key]


def join(store: TargetStore, image_set: ImageSet, layers: Sequence[str]) -> Source:
    """Find the rows of `image_set`'s samples in `store`, by id, and check that they are the same samples.

    Raises StoreError for samples or layers that the store lacks, FingerprintMismatch for samples whose label or
    pixels are not those that the teacher saw.
    """
    rows = store.rows_of(image_set.sample_ids.numpy())
    for layer in layers:
        store.spec(feature_array(layer))
    held = store.samples
    _require_equal(store.path, image_set, "label", held.labels[rows], image_set.labels.numpy())
    _require_equal(store.path, image_set, "pixel checksum", held.pixels_crc32c[rows], pixel_checksums(image_set))
    if store.spec(LOGITS).row_shape != (image_set.num_classes,):
        raise StoreError(
            f"{store.path} has logits of {store.spec(LOGITS).row_shape[0]} classes, the data set has "
            f"{image_set.num_classes}: cache a teacher of these classes."
        )
    return Source(store, torch.from_numpy(rows), tuple(layers))


def _require_equal(path: Path, image_set: ImageSet, what: str, stored: np.ndarray, wanted: np.ndarray) -> None:
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


def _residence(num_bytes: int, device: torch.device) -> str:
    """Where targets of this size live: on the device, in RAM, or on disk behind a memory map."""
    if device.type == "cuda" and num_bytes < torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "memory" if num_bytes < free // 2 else "mapped"
