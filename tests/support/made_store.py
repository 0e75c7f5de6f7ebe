"""Small test stores of random numbers, shaped so that shards, chunks and pages do not divide evenly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe.store import (
    ArraySpec,
    Codec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    Unit,
    create_store,
    finish_store,
    rows_per_unit,
    write_unit,
)
from kdpipe.store.format.encodings.head import head_record

SPECS = (ArraySpec("logits", (10,), "float16"), ArraySpec("features/layer2.0", (3, 5, 5), "float32"))


@dataclass(frozen=True)
class MadeStore:
    """A store on disk and the numbers written to it, by array: [V, N, ...]."""

    path: Path
    manifest: Manifest
    samples: Samples
    contents: dict[str, NDArray[np.floating]]

    def rows(self, unit: Unit) -> dict[str, NDArray[np.floating]]:
        return {name: values[unit.view, unit.start : unit.stop] for name, values in self.contents.items()}

    def fill(self, units: Iterable[Unit]) -> None:
        for unit in units:
            write_unit(self.path, self.manifest, unit, self.rows(unit))
        finish_store(self.path)

    @property
    def units(self) -> list[Unit]:
        return self.manifest.layout.units()


def make_store(
    path: Path,
    num_views: int = 2,
    num_samples: int = 2500,
    fill: bool = True,
    codec: Codec | None = None,
    specs: tuple[ArraySpec, ...] = SPECS,
    named_axes: bool = True,
    head: NDArray[np.float32] | None = None,
) -> MadeStore:
    rng = np.random.default_rng(7)
    samples = Samples(
        ids=rng.permutation(num_samples * 3)[:num_samples].astype(np.int64),
        labels=rng.integers(0, 10, num_samples),
        pixels_crc32c=rng.integers(0, 2**32, num_samples, dtype=np.uint32),
    )
    identity = Identity(
        {"architecture": {"model": "cnn"}, "weights_sha256": "a" * 64},
        {"name": "made", **samples.digests()},
        {"seed": 3},
    )
    unit_rows = rows_per_unit(specs, num_samples, shard_bytes=4096)
    layout = StoreLayout(num_views, unit_rows, (num_samples,))
    record = None if head is None else head_record(head)
    manifest = Manifest(identity, specs, layout, {"kdpipe": "0"}, codec=codec, named_axes=named_axes, head=record)
    contents = {
        spec.name: rng.standard_normal((num_views, num_samples, *spec.row_shape)).astype(spec.dtype) for spec in specs
    }
    create_store(path, manifest, samples, head)
    made = MadeStore(path, manifest, samples, contents)
    if fill:
        made.fill(made.units)
    return made


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
