"""Target stores: what a teacher said, on disk and in memory. Numpy and Zarr alone; no torch."""

from store.change import Change
from store.claims import Claim, Holder, claim, holder
from store.codec import Codec
from store.durable import fsync_path, make_folders, sweep_partial, write_atomically
from store.errors import FingerprintMismatch, KdpipeError, StoreError, differences
from store.fidelity import measure_dense, measure_features, measure_topk
from store.geometry import ArraySpec, Geometry, Unit, rows_per_unit
from store.grow import ensure_store, plan_growth
from store.identity import Identity, canonical_json
from store.lock import LockedError, exclusive, shared
from store.manifest import Manifest, made_with
from store.opening import open_store
from store.reader import TargetStore
from store.remote import is_url
from store.samples import Samples, ids_and_labels_sha256, read_samples, row_order
from store.staging import StagingArea, default_area, needs_staging, stage
from store.topk import TopK, default_temperatures, encode_topk, interpolation
from store.transcode import transcode
from store.writer import (
    create_store,
    finish_store,
    missing_arrays,
    missing_units,
    store_bytes,
    sweep_unit,
    write_unit,
)
from store.zarr_group import read_store_manifest

__all__ = [
    "ArraySpec",
    "Change",
    "Claim",
    "Codec",
    "FingerprintMismatch",
    "Geometry",
    "Holder",
    "Identity",
    "KdpipeError",
    "LockedError",
    "Manifest",
    "Samples",
    "StagingArea",
    "StoreError",
    "TargetStore",
    "TopK",
    "Unit",
    "canonical_json",
    "claim",
    "create_store",
    "default_area",
    "default_temperatures",
    "differences",
    "encode_topk",
    "ensure_store",
    "exclusive",
    "finish_store",
    "fsync_path",
    "holder",
    "ids_and_labels_sha256",
    "interpolation",
    "is_url",
    "made_with",
    "make_folders",
    "measure_dense",
    "measure_features",
    "measure_topk",
    "missing_arrays",
    "missing_units",
    "needs_staging",
    "open_store",
    "plan_growth",
    "read_samples",
    "read_store_manifest",
    "row_order",
    "rows_per_unit",
    "shared",
    "stage",
    "store_bytes",
    "sweep_partial",
    "sweep_unit",
    "transcode",
    "write_atomically",
    "write_unit",
]
