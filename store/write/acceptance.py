"""Refuse what readers would refuse, before a teacher computes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.encoding_error import TEMPERATURES
from kdpipe.store.format.layout import Unit
from kdpipe.store.format.manifest import Finished, Manifest
from kdpipe.store.format.markers import Marker, marker_text
from kdpipe.store.format.samples import Samples
from kdpipe.store.format.schema import MARKER_BYTES, METADATA_BYTES
from kdpipe.store.format.zarr_metadata import metadata_bytes, parse_group


def require_readable(manifest: Manifest, where: str) -> None:
    """Raise StoreError unless a finished store with this manifest can be opened, its markers included."""
    names = tuple(spec.name for spec in manifest.arrays)
    try:
        marker = _longest_marker(manifest)
        finished = Finished(manifest.layout.num_views, len(manifest.layout.segments), names, marker.fidelity)
        files = metadata_bytes(replace(manifest, finished=finished))
        fault = _collision(files) or _too_large(manifest, files, marker) or _refusal(files["zarr.json"], where)
    except (TypeError, ValueError, OverflowError) as error:  # what JSON does not have, such as NaN
        fault = str(error)
    if fault:
        raise StoreError(
            f"{where} would be refused by every reader: {fault[:400]}. Change cache.layers, the names of the teacher's "
            "modules, views.num_views or cache.shard_bytes."
        )


def require_samples(manifest: Manifest, samples: Samples, where: str) -> None:
    """Raise StoreError unless the samples are those of the manifest, each with an id of its own."""
    ids, data = samples.ids, manifest.identity.data
    fault = None
    if len(ids) and ids.min() < 0:
        fault = f"the sample id {ids.min()} is negative"
    elif len(np.unique(ids)) < len(ids):
        fault = "two samples have one id"
    elif len(ids) != manifest.layout.num_samples or any(data.get(k) != v for k, v in samples.digests().items()):
        fault = "the samples are not those that its manifest describes"
    if fault:
        raise StoreError(f"{where} would be refused by every reader: {fault}.")


def _collision(keys: Collection[str]) -> str | None:
    """Return which array takes the place of a metadata file."""
    folders = {key.rpartition("/")[0] for key in keys}
    taken = next(iter(sorted(folders.intersection(keys))), None)
    return f"{taken!r} is the name of an array and of a metadata file" if taken else None


def _longest_marker(manifest: Manifest) -> Marker:
    """Return a marker that is as long as any of its store, with figures of as many digits as they may have."""
    rows, figure = manifest.layout.unit_rows, 1.23456e-07
    logits: dict[str, Any] = {"num_rows": rows, "kl_rows": rows, "top1_flips": rows, "largest_error": figure}
    logits["kl"] = {f"{value:g}": figure for value in TEMPERATURES}
    features = {"num_rows": rows, "largest_error": figure, "squared_error": figure, "squared": figure}
    files = {spec.name: {"bytes": 2**33, "crc32c": 2**32 - 1} for spec in manifest.arrays}
    layers = [spec.name for spec in manifest.arrays if not spec.name.startswith("logits")]
    return Marker(files, {"logits": logits, **dict.fromkeys(layers, features)})


def _too_large(manifest: Manifest, files: dict[str, bytes], marker: Marker) -> str | None:
    for key, raw in files.items():
        if len(raw) > METADATA_BYTES:
            return f"{key} needs {len(raw):,} bytes and may have {METADATA_BYTES:,}"
    num_bytes = len(marker_text(manifest, Unit(0, 0, 0, manifest.layout.unit_rows), marker))
    if num_bytes > MARKER_BYTES:
        return f"{len(manifest.arrays)} arrays need markers of {num_bytes:,} bytes, which may have {MARKER_BYTES:,}"
    return None


def _refusal(raw: bytes, where: str) -> str | None:
    try:
        parse_group(raw, where)
    except StoreError as error:
        return str(error.__cause__ or error).rstrip(".")
    return None
