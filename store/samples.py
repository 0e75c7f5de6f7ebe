"""Which samples a store holds: their ids, labels and pixel checksums, row by row, in the Zarr group `samples`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.errors import StoreError

SAMPLES = "samples"


@dataclass(frozen=True)
class Samples:
    """The rows of a store: ids int64 [N], unique; labels int64 [N]; crc32c of each sample's pixels, uint32 [N]."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels_crc32c: NDArray[np.uint32]

    def digests(self) -> dict[str, str]:
        """sha256 over ids and labels, and over the pixel checksums, the same on every machine."""
        return {
            "ids_and_labels_sha256": ids_and_labels_sha256(self.ids, self.labels),
            "pixels_sha256": hashlib.sha256(self.pixels_crc32c.astype("<u4").tobytes()).hexdigest(),
        }


def ids_and_labels_sha256(ids: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """sha256, in hexadecimal, over all ids and then all labels, int64 little-endian, in the samples' order."""
    return hashlib.sha256(ids.astype("<i8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def write_samples(group: zarr.Group, samples: Samples) -> None:
    """Create the arrays of `samples` in a store's group, one chunk each."""
    records: dict[str, NDArray[Any]] = {
        "ids": samples.ids,
        "labels": samples.labels,
        "pixels_crc32c": samples.pixels_crc32c,
    }
    for name, values in records.items():
        group.create_array(
            f"{SAMPLES}/{name}",
            data=values,
            chunks=values.shape,
            compressors=None,
            dimension_names=["sample"],
        )


def read_samples(path: Path, num_samples: int, data: Mapping[str, Any]) -> Samples:
    """Read the samples of the store at `path` and check them against the digests in its identity's `data`."""
    wanted = {"ids": "int64", "labels": "int64", "pixels_crc32c": "uint32"}
    try:
        arrays = {name: zarr.open_array(path / SAMPLES / name, mode="r") for name in wanted}
        if any(a.shape != (num_samples,) or a.dtype != wanted[name] for name, a in arrays.items()):
            raise StoreError(f"{path / SAMPLES} does not hold {num_samples} samples, as the manifest says.")
        samples = Samples(**{name: np.asarray(array[:]) for name, array in arrays.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path / SAMPLES} is damaged: {error}. Delete the store and cache again.") from error
    found = samples.digests()
    if any(data.get(key) != digest for key, digest in found.items()):
        raise StoreError(f"{path / SAMPLES} is damaged: its digests do not fit. Delete the store and cache again.")
    return samples
