"""What the stores say about a batch: rows joined by sample id, on the device, in RAM, memory-mapped, or streamed.

The teacher is never loaded: all that is read here was written by `cache-teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.datasets.image_set import ImageSet, pixel_checksums
from stages.features import Outputs, TeacherOutputs
from stages.forms import MAP
from stages.top_k import TopKOutputs
from store import FingerprintMismatch, StoreError, TargetStore

LOGITS = "logits"

Missing = Literal["error", "hard-labels"]
"""What samples without targets are: an error, or taught by their labels alone."""

GIB = 2**30


@section
class ReadConfig:
    """Where targets live while a student learns from them, by their size: all views of the arrays that it wants.

    device_bytes: up to so many on the GPU. memory_bytes: up to so many in RAM. mapped_bytes: up to so many read from
    the mapped store, row by row, the kernel keeping what it can. Beyond that they are streamed: an epoch reads slab
    after slab, each once, and holds no more than memory_bytes. Sizes decide, not the machine: the batches of an epoch
    are the same everywhere.
    """

    device_bytes: Annotated[int, Field(ge=0)] = 8 * GIB
    memory_bytes: Annotated[int, Field(ge=0)] = 8 * GIB
    mapped_bytes: Annotated[int, Field(ge=0)] = 64 * GIB


def feature_array(layer: str) -> str:
    """The name of the array that holds a layer's feature maps."""
    return f"{MAP}/{layer}"


def names_wanted(store: TargetStore, layers: Sequence[str]) -> list[str]:
    """The arrays that hold a store's logits and the feature maps of `layers`."""
    logits = [spec.name for spec in store.arrays if spec.name.startswith(LOGITS)]
    return [*logits, *map(feature_array, layers)]


@dataclass(frozen=True)
class Source:
    """One store, the rows of the student's samples in it, int64 [N], and the layers wanted of it.

    Samples that the store lacks have row -1.
    """

    store: TargetStore
    rows: Tensor
    layers: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return names_wanted(self.store, self.layers)


class Targets:
    """The targets of a student's samples from one or several stores.

    residence: "device", "memory", "mapped" or "streamed". slabs: where they are streamed, the shard of the first
    store in which each sample's targets lie, int64 [N], of which `window` fit into memory at once, twice over.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device, config: ReadConfig | None = None) -> None:
        config = config or ReadConfig()
        wanted = [(source.store, source.names) for source in sources]
        window = slab_window(wanted, config)
        self._device = device
        self._sources = tuple(sources)
        self._held: dict[tuple[int, str, int], Tensor] = {}
        known = torch.stack([source.rows >= 0 for source in sources]).all(0)
        if not known.any():
            places = ", ".join(str(source.store.path) for source in sources)
            raise StoreError(
                f"no sample has targets in every one of {places}: several stores are several teachers of the same "
                "samples."
            )
        self._known = None if known.all() else known
        self.slabs: Tensor | None = None
        self.window = window or 1
        if window is None:
            self.residence = _residence(_num_bytes(wanted), device, config)
        else:
            self.residence = "streamed"
            self.slabs = sources[0].rows.clamp(min=0) // sources[0].store.unit_rows
            share = config.memory_bytes // len(sources)
            self._sources = tuple(replace(source, store=source.store.streamed(share)) for source in sources)

    def describe(self) -> list[str]:
        """How each store is read and why, for people."""
        return [f"{source.store.path}: {self._how(source)}" for source in self._sources]

    @property
    def num_unknown(self) -> int:
        """How many of the samples have no targets."""
        return 0 if self._known is None else int((~self._known).sum())

    def known(self, indices: Tensor) -> Tensor | None:
        """Which of the samples at `indices`, int64 [B], all stores have targets for: bool [B]; None where all have."""
        return None if self._known is None else self._known[indices]

    def batch(self, view: int, indices: Tensor) -> list[TeacherOutputs]:
        """What each store says about the samples at `indices`, int64 [B], in `view`: float32 tensors on the device.

        All of them must be known.
        """
        return [self._outputs(number, view, indices) for number in range(len(self._sources))]

    def _outputs(self, number: int, view: int, indices: Tensor) -> TeacherOutputs:
        source = self._sources[number]
        rows = source.rows[indices]
        read = {name: self._rows(number, name, view, rows) for name in source.names}
        features = {layer: read[feature_array(layer)].float() for layer in source.layers}
        form = source.store.manifest.top_k
        if form is None:
            return Outputs(read[LOGITS].float(), features)
        return TopKOutputs(form, read["logits/values"], read["logits/indices"], read["logits/tail"], features)

    def _rows(self, number: int, name: str, view: int, rows: Tensor) -> Tensor:
        if self.residence in ("mapped", "streamed"):
            gathered = torch.from_numpy(self._sources[number].store.take(name, view, rows.numpy()))
            return gathered.to(self._device, non_blocking=True)
        slab = self._slab(number, name, view)
        return slab.index_select(0, rows.to(slab.device)).to(self._device, non_blocking=True)

    def _slab(self, number: int, name: str, view: int) -> Tensor:
        """One view of an array, read whole and checked the first time that it is asked for."""
        key = (number, name, view)
        if key not in self._held:
            slab = torch.from_numpy(self._sources[number].store.read_view(name, view))
            self._held[key] = slab.to(self._device) if self.residence == "device" else slab
        return self._held[key]

    def _how(self, source: Source) -> str:
        total = f"{_num_bytes([(source.store, source.names)]):,} bytes of targets"
        if self.residence == "mapped":
            reading = source.store.reading(source.names[0])
            return f"{total}, {reading.way}: {reading.why}"
        if self.residence == "streamed":
            return f"{total}, streamed in groups of {self.window} slabs, within the recipe's memory_bytes"
        return f"{total}, kept {'on the device' if self.residence == 'device' else 'in memory'}"


def join(store: TargetStore, image_set: ImageSet, layers: Sequence[str], missing: Missing = "error") -> Source:
    """Find the rows of `image_set`'s samples in `store`, by id, and check that they are the same samples.

    Raises StoreError for layers that the store lacks, and for samples that it lacks, unless they may be `missing`;
    FingerprintMismatch for samples whose label or pixels are not those that the teacher saw.
    """
    ids = image_set.sample_ids.numpy()
    at = store.samples.positions_of(ids)
    known = at >= 0
    if not known.all():
        _require_may_be_missing(store, ids[~known], len(ids), missing)
    rows = np.full(len(ids), -1, np.int64)
    rows[known] = store.rows_of(ids[known])
    for layer in layers:
        store.spec(feature_array(layer))
    held = store.samples.take(at[known])
    compared = image_set.take(torch.from_numpy(known.nonzero()[0])) if not known.all() else image_set
    _require_equal(store.path, compared, "label", held.labels, compared.labels.numpy())
    _require_equal(store.path, compared, "pixel checksum", held.pixels_crc32c, pixel_checksums(compared))
    num_classes = store.num_classes
    if num_classes != image_set.num_classes:
        raise StoreError(
            f"{store.path} has logits of {num_classes} classes, the data set has {image_set.num_classes}: cache a "
            "teacher of these classes."
        )
    return Source(store, torch.from_numpy(rows), tuple(layers))


def _require_may_be_missing(store: TargetStore, absent: NDArray[np.int64], num_samples: int, missing: Missing) -> None:
    """Raise StoreError where the store may not lack the samples `absent`, or where it lacks them all."""
    some = f"{store.path} has no targets for {len(absent)} of the {num_samples} samples, such as {absent[:3].tolist()}"
    if len(absent) == num_samples:
        raise StoreError(f"{some}: it was made from another data set, or with other sample ids.")
    if missing == "error":
        raise StoreError(
            f"{some}: cache them with `kdpipe cache-teacher`, leave them out of the data set, or let them learn from "
            "their labels alone with student.missing = 'hard-labels'."
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


def slab_window(wanted: Sequence[tuple[TargetStore, Sequence[str]]], config: ReadConfig) -> int | None:
    """How many slabs of the wanted arrays are mixed at a time where stores are streamed; None where they are not.

    Half of memory_bytes holds a window, the other half the next one, which a batch may reach into.
    """
    if _num_bytes(wanted) <= max(config.memory_bytes, config.mapped_bytes):
        return None
    unit_rows = max(store.unit_rows for store, _ in wanted)
    slab_bytes = unit_rows * sum(store.spec(name).row_bytes for store, names in wanted for name in names)
    return max(1, config.memory_bytes // (2 * slab_bytes))


def _num_bytes(wanted: Sequence[tuple[TargetStore, Sequence[str]]]) -> int:
    """What all views of the wanted arrays take in memory."""
    return sum(
        store.num_views * store.num_rows * store.spec(name).row_bytes for store, names in wanted for name in names
    )


def _residence(num_bytes: int, device: torch.device, config: ReadConfig) -> str:
    """Where targets that are not streamed live. A GPU without room leaves them in RAM, which changes no number."""
    if device.type == "cuda" and num_bytes <= min(config.device_bytes, torch.cuda.mem_get_info(device)[0] // 2):
        return "device"
    return "memory" if num_bytes <= config.memory_bytes else "mapped"
