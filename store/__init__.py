"""Target stores: what a teacher said, on disk and in memory. Numpy and Zarr alone; no torch.

A name is imported when it is first used (PEP 562): who only looks at a lock, or catches an error, does not wait for
numpy and Zarr.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_ROOMS = {
    "change": ("Change",),
    "claims": ("Claim", "Holder", "claim", "holder"),
    "codec": ("Codec",),
    "durable": ("fsync_path", "make_folders", "sweep_partial", "write_atomically"),
    "errors": ("FingerprintMismatch", "KdpipeError", "StoreError", "differences"),
    "fidelity": ("measure_dense", "measure_features", "measure_topk"),
    "geometry": ("ArraySpec", "Geometry", "Unit", "rows_per_unit"),
    "grow": ("ensure_store", "plan_growth"),
    "identity": ("Identity", "canonical_json"),
    "lock": ("LockedError", "exclusive", "shared"),
    "manifest": ("Manifest", "made_with"),
    "opening": ("open_store",),
    "reader": ("TargetStore",),
    "remote": ("is_url",),
    "samples": ("Samples", "ids_and_labels_sha256", "read_samples", "row_order"),
    "staging": ("StagingArea", "default_area", "needs_staging", "stage"),
    "topk": ("TopK", "default_temperatures", "encode_topk", "interpolation"),
    "transcode": ("transcode",),
    "writer": (
        "create_store",
        "finish_store",
        "missing_arrays",
        "missing_units",
        "store_bytes",
        "sweep_unit",
        "write_unit",
    ),
    "zarr_group": ("read_store_manifest",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


if not TYPE_CHECKING:  # mypy goes by the imports above, and finds a wrong name

    def __getattr__(name: str) -> Any:
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """The room `transcode` holds the function `transcode`: here the name stands for the function, whoever imports
        the room first.
        """
        if isinstance(value, ModuleType) and _ROOM_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
