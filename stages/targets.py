"""What the stores say about a batch: rows joined by sample id, on the device, in RAM, memory-mapped, or streamed.

The teacher is never loaded: all that is read here was written by `cache-teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.class_map import MappedOutputs
from stages.config import Bytes, section
from stages.features import DenseOutputs, TeacherOutputs
from stages.forms import Wanted
from stages.joining import Source
from stages.serving import LOGITS
from stages.top_k import TopKOutputs
from store import StoreError, TargetStore

GIB = 2**30


@section
class TargetLoadingConfig:
    """Where targets live while a student learns from them, by their size: all views of the arrays that it wants.

    device_bytes: up to so many on the GPU. memory_bytes: up to so many in RAM. mapped_bytes: up to so many read from
    the mapped store, row by row, the kernel keeping what it can. Beyond that they are streamed: an epoch reads slab
    after slab, each once, and holds no more than memory_bytes. Sizes decide, not the machine: the batches of an epoch
    are the same everywhere.
    """

    device_bytes: Bytes = 8 * GIB
    memory_bytes: Bytes = 8 * GIB
    mapped_bytes: Bytes = 64 * GIB


class Targets:
    """The targets of a student's samples from one or several stores.

    residence: "device", "memory", "mapped" or "streamed". slabs: where they are streamed, the shard of the first
    store in which each sample's targets lie, int64 [N], of which `window` fit into memory at once, twice over.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device, config: TargetLoadingConfig | None = None) -> None:
        config = config or TargetLoadingConfig()
        wanted = [(source.store, source.names) for source in sources]
        window = slab_window(wanted, config)
        self._device = device
        self._sources = tuple(sources)
        self._held: dict[tuple[int, str, int], Tensor] = {}
        held = [source.rows >= 0 for source in sources]
        for source, known in zip(sources, held, strict=True):
            if not known.any():
                raise StoreError(
                    f"{source.store.path} has targets for none of the samples: several stores are several teachers of "
                    "the same samples."
                )
        self._known = [None if known.all() else known for known in held]
        self.num_unknown = int((~torch.stack(held).any(0)).sum())
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

    def known(self, indices: Tensor) -> list[Tensor | None]:
        """For each store, which of the samples at `indices`, int64 [B], it has targets for: bool [B]; None where it has
        all.
        """
        return [None if known is None else known[indices] for known in self._known]

    def positions(self, number: int) -> Tensor:
        """Where the samples stand that store `number` has targets for, int64 [n]."""
        known = self._known[number]
        return torch.arange(len(self._sources[number].rows)) if known is None else known.nonzero()[:, 0]

    def batch(self, view: int, indices: Tensor) -> list[TeacherOutputs]:
        """What each store says about the samples at `indices`, int64 [B], in `view`: float32 tensors on the device.

        The rows of samples that a store does not know hold something, and mean nothing.
        """
        return [self._outputs(number, view, indices) for number in range(len(self._sources))]

    def features(self, number: int, view: int, indices: Tensor, wanted: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Some of what store `number` has of the teacher's layers, and no logits, float32 on the device."""
        source = self._sources[number]
        rows = _readable(source.rows[indices])
        servings = [serving for serving in source.servings if serving.wanted in wanted]
        read = {name: self._rows(number, name, view, rows) for name in {serving.array for serving in servings}}
        return {serving.wanted: serving(read[serving.array].float()) for serving in servings}

    def _outputs(self, number: int, view: int, indices: Tensor) -> TeacherOutputs:
        source = self._sources[number]
        rows = _readable(source.rows[indices])
        read = {name: self._rows(number, name, view, rows) for name in source.names}
        features = {serving.wanted: serving(read[serving.array].float()) for serving in source.servings}
        form = source.store.manifest.top_k
        said: TeacherOutputs
        if form is None:
            said = DenseOutputs(read[LOGITS].float(), features)
        else:
            said = TopKOutputs(form, read["logits/values"], read["logits/indices"], read["logits/tail"], features)
        return said if source.class_map is None else MappedOutputs(said, source.class_map)

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
            reading = source.store.read_mode(source.names[0])
            return f"{total}, {reading.mode}: {reading.reason}"
        if self.residence == "streamed":
            return f"{total}, streamed in groups of {self.window} slabs, within the recipe's memory_bytes"
        return f"{total}, kept {'on the device' if self.residence == 'device' else 'in memory'}"


def _readable(rows: Tensor) -> Tensor:
    """Rows, int64 [B], those of unknown samples (-1) replaced by one that is read anyway."""
    return rows if (rows >= 0).all() else torch.where(rows >= 0, rows, rows.max().clamp(min=0))


def slab_window(wanted: Sequence[tuple[TargetStore, Sequence[str]]], config: TargetLoadingConfig) -> int | None:
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


def _residence(num_bytes: int, device: torch.device, config: TargetLoadingConfig) -> str:
    """Where targets that are not streamed live. A GPU without room leaves them in RAM, which changes no number."""
    if device.type == "cuda" and num_bytes <= min(config.device_bytes, torch.cuda.mem_get_info(device)[0] // 2):
        return "device"
    return "memory" if num_bytes <= config.memory_bytes else "mapped"
