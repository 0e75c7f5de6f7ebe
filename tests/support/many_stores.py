"""Test stores of every encoding, whose numbers follow from array, view and sample id.

The expected rows are therefore known however a store was made. A `Wish` is the size that a store shall have; `grow`
extends it to that, as a job does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store import (
    ArraySpec,
    Claim,
    Codec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    TargetStore,
    TopK,
    Unit,
    claim,
    ensure_store,
    finish_store,
    missing_arrays,
    read_samples,
    sweep_unit,
    write_unit,
)
from kdpipe.store.format.encodings.head import head_record
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import Quantized
from kdpipe.store.format.encodings.quantized_maps import quantized_specs
from kdpipe.store.format.encodings.sampled import Sampled

UNIT_ROWS = 512
NUM_NUMBERS = 5003
"""A prime: the numbers of a sample are row id % NUM_NUMBERS of a table, another one for other ids."""

TOP_K = TopK(num_classes=20, k=8, temperatures=(1.0, 2.0, 4.0, 8.0), dtype=None)
"""Of an older store, with three arrays; packed rows are as those of `SAMPLED`."""

INT4, SAMPLED = Quantized("int4", num_classes=8), Sampled(num_classes=20, k=8, seed=3)
EIGHT_BITS = quantized_specs(ArraySpec("features/layer1", (2, 4, 4), "float16"))
HEAD = np.random.default_rng(5).standard_normal((8, 13)).astype(np.float32)
LAYERS = (ArraySpec("features/layer2.0", (2, 3, 3), "float32"), ArraySpec("pooled/layer3", (8,), "float16"))


@dataclass(frozen=True)
class Form:
    """Logits of a store and their encoding; `id_step` spreads the ids."""

    logits: tuple[ArraySpec, ...]
    encoding: LogitEncoding | None = None
    codec: Codec | None = None
    id_step: int = 3
    unit_rows: int = UNIT_ROWS
    head: NDArray[np.float32] | None = None


LOGITS = {
    "float16": Form((ArraySpec("logits", (8,), "float16"),)),
    "float32": Form((ArraySpec("logits", (8,), "float32"),), id_step=1),
    "head": Form((ArraySpec("features/pre_logits", (12,), "float16"),), head=HEAD),
    "int4": Form((*INT4.arrays("float16"), *EIGHT_BITS), INT4),
    "sampled": Form(SAMPLED.arrays("float16"), SAMPLED),
    "top-k": Form(TOP_K.arrays("float16"), TOP_K, id_step=10**12 + 39),
}


@dataclass(frozen=True)
class Wish:
    """Size of a store: views, the first `num_samples` samples of the data set, the first layers."""

    form: Form
    num_views: int = 2
    num_samples: int = 1300
    num_layers: int = 1

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        return (*self.form.logits, *LAYERS[: self.num_layers])

    @property
    def samples(self) -> Samples:
        """Unordered ids, so that those of an extension are between the existing ones."""
        numbers = np.random.default_rng(7).permutation(NUM_NUMBERS - 1)[: self.num_samples].astype(np.int64)
        ids = numbers * self.form.id_step
        return Samples(ids, numbers % 10, (numbers * 2654435761 % 2**32).astype(np.uint32))

    @property
    def manifest(self) -> Manifest:
        data = {"name": "made", "classes": [f"class {number}" for number in range(8)], **self.samples.digests()}
        identity = Identity(
            {"architecture": {"model": "cnn"}, "weights_sha256": "a" * 64},
            {**data, "num_samples": self.num_samples},
            {"seed": 3},
        )
        layout = StoreLayout(self.num_views, self.form.unit_rows, (self.num_samples,))
        form = self.form
        head = None if form.head is None else head_record(form.head)
        versions = {"kdpipe": "0"}
        return Manifest(identity, self.specs, layout, versions, encoding=form.encoding, codec=form.codec, head=head)


@cache
def _numbers(spec: ArraySpec, view: int) -> NDArray[Any]:
    rng = np.random.default_rng([zlib.crc32(spec.name.encode()), view])
    shape = (NUM_NUMBERS, *spec.row_shape)
    if spec.name == "logits/indices":
        rows = np.stack([rng.permutation(TOP_K.num_classes)[: TOP_K.k] for _ in range(NUM_NUMBERS)])
        return rows.astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


def truth(spec: ArraySpec, view: int, ids: NDArray[np.int64]) -> NDArray[Any]:
    """Return the rows [B, *row_shape] that every store has for these samples."""
    return _numbers(spec, view)[ids % NUM_NUMBERS]


def random_rows(path: Path, manifest: Manifest, unit: Unit, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the expected rows of a unit of the store at `path`, in some arrays."""
    samples = read_samples(path, manifest.layout, manifest.identity.data)
    rows = manifest.layout.sample_rows()
    ids = samples.ids[(rows >= unit.start) & (rows < unit.stop)]
    return {name: truth(manifest.spec(name), unit.view, ids) for name in names}


def commit(path: Path, manifest: Manifest, unit: Unit) -> None:
    """Compute and write what a unit lacks, after removing the files of a killed job."""
    sweep_unit(path, manifest, unit)
    if lacking := missing_arrays(path, manifest, unit):
        write_unit(path, manifest, unit, random_rows(path, manifest, unit, lacking))


def fill(path: Path, manifest: Manifest) -> None:
    for unit in manifest.layout.units():
        commit(path, manifest, unit)
    finish_store(path)


def grow(path: Path, *wishes: Wish) -> Path:
    """Bring the store at `path` to each wish in turn, with a single writer."""
    for wish in wishes:
        fill(path, ensure_store(path, wish.manifest, wish.samples, head=wish.form.head))
    return path


def work(path: Path, wish: Wish) -> None:
    """Fill unclaimed units, as one of several jobs that bring the store at `path` to a wish."""
    manifest = ensure_store(path, wish.manifest, wish.samples, head=wish.form.head)
    for unit in manifest.layout.units():
        acquired = claim(path, unit.key) if missing_arrays(path, manifest, unit) else None
        if isinstance(acquired, Claim):
            try:
                commit(path, manifest, unit)
            finally:
                acquired.release()
    finish_store(path)


def first_difference(store: TargetStore) -> str | None:
    """Return where a store reads other numbers than the truth, by any way of reading; None if nowhere."""
    ids = store.samples.ids
    rows = store.rows_of(ids)
    for spec in store.arrays:
        for view in range(store.num_views):
            expected = truth(spec, view, ids).tobytes()
            if store.gather(spec.name, view, ids).tobytes() != expected:
                return f"gather of {spec.name}, view {view}"
            if store.read_view(spec.name, view)[rows].tobytes() != expected:
                return f"read_view of {spec.name}, view {view}"
    return None
