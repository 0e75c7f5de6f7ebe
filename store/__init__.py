"""Target stores: what a teacher said, on disk and in memory. Numpy and Zarr alone; no torch."""

from store.durable import fsync_path, make_folders, sweep_partial, write_atomically
from store.errors import FingerprintMismatch, KdpipeError, StoreError, differences
from store.geometry import ArraySpec, Unit, all_units, rows_per_unit
from store.lock import LockedError, exclusive
from store.manifest import Identity, Manifest, canonical_json
from store.reader import TargetStore, open_store
from store.samples import Samples, ids_and_labels_sha256
from store.writer import create_store, missing_units, require_same, store_bytes, write_unit
from store.zarr_group import read_store_manifest

__all__ = [
    "ArraySpec",
    "FingerprintMismatch",
    "Identity",
    "KdpipeError",
    "LockedError",
    "Manifest",
    "Samples",
    "StoreError",
    "TargetStore",
    "Unit",
    "all_units",
    "canonical_json",
    "create_store",
    "differences",
    "exclusive",
    "fsync_path",
    "ids_and_labels_sha256",
    "make_folders",
    "missing_units",
    "open_store",
    "read_store_manifest",
    "require_same",
    "rows_per_unit",
    "store_bytes",
    "sweep_partial",
    "write_atomically",
    "write_unit",
]
