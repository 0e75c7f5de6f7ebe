"""Read a batch's targets from the stores: on the device, in RAM, memory-mapped, or streamed.

The teacher is never loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdpipe.stages.config import Bytes, section
from kdpipe.stages.runtime.memory import free_gpu_bytes
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.join import JoinedStore
from kdpipe.stages.targets.outputs import (
    DenseTargets,
    TeacherTargets,
    TransformedTargets,
    decode_features,
    head_logits,
    teacher_targets,
)
from kdpipe.stages.targets.resolve import stored_parts
from kdpipe.store import TargetStore
from kdpipe.store.format.manifest import EMBEDDINGS
from kdpipe.store.read.mapped_views import Verify

GIB = 2**30


@section
class TargetLoadingConfig:
    """Configuration of where targets reside during training, by their size: all views of the required arrays.

    Beyond all limits targets are streamed: an epoch reads shard after shard, each once, within memory_bytes. Only
    sizes decide, not the machine, so that the batches of an epoch are the same everywhere.

    Attributes:
        device_bytes: up to this size on the GPU.
        memory_bytes: up to this size in RAM.
        mapped_bytes: up to this size memory-mapped, with row-wise reads through the page cache.
        verify: when mapped shards are checked against their checksums: at the "first" use of a view, "always" when
            an epoch begins with another view, or "never"; what is read into memory is always checked.
        follow_links: Follow links that lead out of the stores, as DVC and the Hugging Face cache make them.
    """

    device_bytes: Bytes = 8 * GIB
    memory_bytes: Bytes = 8 * GIB
    mapped_bytes: Bytes = 64 * GIB
    verify: Verify = "first"
    follow_links: bool = False


class Targets:
    """The targets of a data set's samples from one or several stores.

    Attributes:
        residence: "device", "memory", "mapped" or "streamed".
        slabs: If streamed, the shard of the first store with each sample's targets, int64 [N].
        window: The number of shards that are mixed at a time, of which two sets fit into memory.
        num_without_targets: The number of samples that have no targets in any store.
    """

    def __init__(
        self, sources: Sequence[JoinedStore], device: torch.device, config: TargetLoadingConfig | None = None
    ) -> None:
        config = config or TargetLoadingConfig()
        stores = [(source.store, source.names) for source in sources]
        window = slab_window(stores, config)
        self._device = device
        self._sources = tuple(sources)
        self._slabs: dict[tuple[int, str, int], Tensor] = {}
        self._heads: dict[int, Tensor] = {}
        masks = [source.rows >= 0 for source in sources]
        self._masks = [None if mask.all() else mask for mask in masks]
        self.num_without_targets = int((~torch.stack(masks).any(0)).sum())
        self.slabs: Tensor | None = None
        self.window = window or 1
        if window is None:
            self.residence = _residence(_num_bytes(stores), device, config)
            if self.residence == "mapped":
                self._sources = tuple(replace(one, store=one.store.verifying(config.verify)) for one in sources)
        else:
            self.residence = "streamed"
            self.slabs = sources[0].rows.clamp(min=0) // sources[0].store.unit_rows
            share = config.memory_bytes // len(sources)
            self._sources = tuple(replace(source, store=source.store.streamed(share)) for source in sources)

    def describe(self) -> list[str]:
        """Return one line per store about how it is read and why."""
        return [f"{source.store.path}: {self._describe(source)}" for source in self._sources]

    def target_masks(self, indices: Tensor) -> list[Tensor | None]:
        """Return for each store which of the samples at `indices`, int64 [B], have targets: bool [B], None for all."""
        return [None if mask is None else mask[indices] for mask in self._masks]

    def samples_with_targets(self, number: int) -> Tensor:
        """Return the indices of the samples that have targets in store `number`, int64 [n]."""
        mask = self._masks[number]
        return torch.arange(len(self._sources[number].rows)) if mask is None else mask.nonzero()[:, 0]

    def batch(self, view: int, indices: Tensor) -> list[TeacherTargets]:
        """Return each store's outputs for the samples at `indices`, int64 [B], in `view`: float32 on the device.

        Rows of samples without targets in a store have arbitrary values.
        """
        return [self._outputs(number, view, indices) for number in range(len(self._sources))]

    def features(
        self, number: int, view: int, indices: Tensor, features: Sequence[FeatureSpec]
    ) -> dict[FeatureSpec, Tensor]:
        """Return some features of store `number`, without logits, float32 on the device."""
        sources = [source for source in self._sources[number].features if source.feature in features]
        names = stored_parts(self._sources[number].store, {source.array for source in sources})
        read = self._read(number, names, view, indices)
        return {source.feature: source(decode_features(read, source.array)) for source in sources}

    def _outputs(self, number: int, view: int, indices: Tensor) -> TeacherTargets:
        joined = self._sources[number]
        read = self._read(number, joined.names, view, indices)
        features = {
            source.feature: self._head(number)
            if source.feature.is_head
            else source(decode_features(read, source.array))
            for source in joined.features
        }
        outputs: TeacherTargets
        if joined.store.manifest.logits_from_head:
            outputs = DenseTargets(head_logits(read[EMBEDDINGS].float(), self._head(number)), features)
        else:
            outputs = teacher_targets(joined.store.manifest.encoding, read, features)
        return outputs if joined.class_map is None else TransformedTargets(outputs, joined.class_map.map_logits)

    def _read(self, number: int, names: Iterable[str], view: int, indices: Tensor) -> dict[str, Tensor]:
        """Return rows of arrays by name; of samples without targets, whose row is -1, a row that is read anyway."""
        rows = self._sources[number].rows[indices]
        rows = rows if (rows >= 0).all() else torch.where(rows >= 0, rows, rows.max().clamp(min=0))
        return {name: self._rows(number, name, view, rows) for name in names}

    def _rows(self, number: int, name: str, view: int, rows: Tensor) -> Tensor:
        if self.residence in ("mapped", "streamed"):
            values = torch.from_numpy(self._sources[number].store.take(name, view, rows.numpy()))
            return _copied(values, self._device)
        slab = self._slab(number, name, view)
        return _copied(slab.index_select(0, _copied(rows, slab.device)), self._device)

    def _slab(self, number: int, name: str, view: int) -> Tensor:
        """Return one view of an array, reading and checking it at first use."""
        key = (number, name, view)
        if key not in self._slabs:
            slab = torch.from_numpy(self._sources[number].store.read_view(name, view))
            self._slabs[key] = slab.to(self._device) if self.residence == "device" else slab
        return self._slabs[key]

    def _head(self, number: int) -> Tensor:
        """Return the teacher's head in store `number`, [C, D + 1] on the device, reading it at first use."""
        if number not in self._heads:
            self._heads[number] = torch.from_numpy(self._sources[number].store.head).to(self._device)
        return self._heads[number]

    def _describe(self, source: JoinedStore) -> str:
        total = f"{_num_bytes([(source.store, source.names)]):,} bytes of targets"
        if self.residence == "mapped":
            reading = source.store.read_mode(source.names[0])
            return f"{total}, {reading.mode}: {reading.reason}"
        if self.residence == "streamed":
            return f"{total}, streamed in groups of {self.window} shards, within memory_bytes"
        return f"{total}, kept {'on the device' if self.residence == 'device' else 'in memory'}"


def _copied(values: Tensor, device: torch.device) -> Tensor:
    """Return values on the device, copied to a GPU from pinned memory, so that nothing waits for it."""
    if values.device == device or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def slab_window(stores: Sequence[tuple[TargetStore, Sequence[str]]], config: TargetLoadingConfig) -> int | None:
    """Return the number of shards that are mixed at a time if stores are streamed; None if they are not.

    Half of memory_bytes is for a window, the other half for the next one, which a batch may reach into. `stores` has
    each store with the names of the arrays to read.
    """
    if _num_bytes(stores) <= max(config.memory_bytes, config.mapped_bytes):
        return None
    unit_rows = max(store.unit_rows for store, _ in stores)
    slab_bytes = unit_rows * sum(store.spec(name).row_bytes for store, names in stores for name in names)
    return max(1, config.memory_bytes // (2 * slab_bytes))


def _num_bytes(stores: Sequence[tuple[TargetStore, Sequence[str]]]) -> int:
    """Return the size of all views of the required arrays in memory."""
    return sum(
        store.num_views * store.num_rows * store.spec(name).row_bytes for store, names in stores for name in names
    )


def _residence(num_bytes: int, device: torch.device, config: TargetLoadingConfig) -> str:
    """Return where targets that are not streamed reside: in RAM if the GPU has no room, with the same results."""
    if device.type == "cuda" and num_bytes <= min(config.device_bytes, free_gpu_bytes(device) // 2):
        return "device"
    return "memory" if num_bytes <= config.memory_bytes else "mapped"
