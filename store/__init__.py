"""Target stores: a teacher's cached outputs, on disk and in memory. Needs numpy and Zarr, no torch.

Names are imported on first use (PEP 562), so that locks and errors cost neither numpy nor Zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.store.errors import FingerprintMismatch, KdpipeError, StoreError, differences
    from kdpipe.store.format.codec import Codec
    from kdpipe.store.format.encodings.encoding_error import all_finite, measure_dense, measure_features, measure_topk
    from kdpipe.store.format.encodings.topk import TopK, default_temperatures, encode_topk, interpolation
    from kdpipe.store.format.identity import Identity, canonical_json
    from kdpipe.store.format.layout import ArraySpec, StoreLayout, Unit, rows_per_unit
    from kdpipe.store.format.manifest import Manifest, version_note
    from kdpipe.store.format.samples import Samples, ids_and_labels_sha256, read_samples, row_order, splitmix64
    from kdpipe.store.format.unit_state import missing_arrays, missing_units, store_bytes
    from kdpipe.store.format.zarr_metadata import read_store_manifest
    from kdpipe.store.fs.atomic_write import fsync_path, make_folders, sweep_partial, write_atomically
    from kdpipe.store.fs.lock import Holder, LockedError, exclusive, shared
    from kdpipe.store.fs.safe_read import read_json
    from kdpipe.store.read.open_store import open_store
    from kdpipe.store.read.target_store import TargetStore
    from kdpipe.store.remote.object_store import is_url
    from kdpipe.store.remote.staging import needs_staging, stage
    from kdpipe.store.remote.staging_cache import StagingCache, default_staging_cache
    from kdpipe.store.write.claims import Claim, claim, holder
    from kdpipe.store.write.extend import ensure_store, plan_growth
    from kdpipe.store.write.transcode import transcode
    from kdpipe.store.write.transcode_options import TranscodeOptions
    from kdpipe.store.write.writer import create_store, finish_store, sweep_unit, write_unit

_MODULES = {
    "errors": "FingerprintMismatch KdpipeError StoreError differences",
    "format.codec": "Codec",
    "format.encodings.encoding_error": "all_finite measure_dense measure_features measure_topk",
    "format.encodings.topk": "TopK default_temperatures encode_topk interpolation",
    "format.identity": "Identity canonical_json",
    "format.layout": "ArraySpec StoreLayout Unit rows_per_unit",
    "format.manifest": "Manifest version_note",
    "format.samples": "Samples ids_and_labels_sha256 read_samples row_order splitmix64",
    "format.unit_state": "missing_arrays missing_units store_bytes",
    "format.zarr_metadata": "read_store_manifest",
    "fs.atomic_write": "fsync_path make_folders sweep_partial write_atomically",
    "fs.lock": "Holder LockedError exclusive shared",
    "fs.safe_read": "read_json",
    "read.open_store": "open_store",
    "read.target_store": "TargetStore",
    "remote.object_store": "is_url",
    "remote.staging": "needs_staging stage",
    "remote.staging_cache": "StagingCache default_staging_cache",
    "write.claims": "Claim claim holder",
    "write.extend": "ensure_store plan_growth",
    "write.transcode": "transcode",
    "write.transcode_options": "TranscodeOptions",
    "write.writer": "create_store finish_store sweep_unit write_unit",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [  # literal, so that linters and type checkers see it; a test compares it with _MODULES
    "ArraySpec", "Claim", "Codec", "FingerprintMismatch", "Holder", "Identity", "KdpipeError", "LockedError",
    "Manifest", "Samples", "StagingCache", "StoreError", "StoreLayout", "TargetStore", "TopK", "TranscodeOptions",
    "Unit", "all_finite", "canonical_json", "claim", "create_store", "default_staging_cache", "default_temperatures",
    "differences", "encode_topk", "ensure_store", "exclusive", "finish_store", "fsync_path", "holder",
    "ids_and_labels_sha256", "interpolation", "is_url", "make_folders", "measure_dense", "measure_features",
    "measure_topk", "missing_arrays", "missing_units", "needs_staging", "open_store", "plan_growth", "read_json",
    "read_samples", "read_store_manifest", "row_order", "rows_per_unit", "shared", "splitmix64", "stage",
    "store_bytes", "sweep_partial", "sweep_unit", "transcode", "version_note", "write_atomically", "write_unit",
]
# fmt: on

if not TYPE_CHECKING:  # mypy uses the imports above and reports unknown names

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
