"""`kdpipe store repair`: check a store and recompute exactly what is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdpipe.stages.cache_teacher.cache import fill_store, layers_of
from kdpipe.stages.cache_teacher.plan import CacheConfig, build_cache_job, plan_store, samples_in_row_order
from kdpipe.stages.context import StageContext
from kdpipe.stages.errors import RunError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.store import Manifest, read_store_manifest
from kdpipe.store.check.repair import restore_samples, uncommit
from kdpipe.store.check.verify import VerifyReport, verify_store
from kdpipe.store.format.schema import SAMPLES
from kdpipe.store.format.zarr_metadata import replace_metadata
from kdpipe.store.write.claims import exclusive_store
from kdpipe.store.write.extend import require_same_origin


def repair(
    config: CacheConfig, path: Path, teacher: ModelBundle, context: StageContext
) -> tuple[VerifyReport, VerifyReport, int]:
    """Repair the store at `path`.

    Metadata are rewritten from the manifest, and samples from the recipe's data set if they are the same. Only damaged
    arrays are recomputed: what was missing stays missing. Open readers are not disturbed. Rerunning finishes a killed
    repair.

    Returns the faults found, those left, and the number of units computed. Raises FingerprintMismatch, at once, if
    the recipe's teacher, views or data set are not the store's; StoreError if it cannot be repaired; LockedError if
    another job is computing a damaged unit.
    """
    manifest = read_store_manifest(path)
    found = verify_store(path, context.monitor.counter("repair", "check", "unit"))
    if not found.damaged:
        return found, found, 0
    _require_own(config, path, manifest, teacher, context)
    with exclusive_store(path):
        manifest = read_store_manifest(path)  # again: another job may have extended the store meanwhile
        replace_metadata(path, manifest)
        if any(fault.key.startswith(f"{SAMPLES}/") or fault.key == SAMPLES for fault in found.damaged):
            restore_samples(path, manifest, context.samples)
    units = uncommit(path, manifest, found.damaged)
    result = fill_store(build_cache_job(config, path, manifest, teacher, context), sorted(units))
    left = verify_store(path, context.monitor.counter("repair", "check again", "unit"))
    return found, left, int(result["num_units_computed"])


def _require_own(
    config: CacheConfig, path: Path, manifest: Manifest, teacher: ModelBundle, context: StageContext
) -> None:
    """Raise unless the store was computed with this teacher, these views and this data set."""
    if manifest.rounded:
        raise RunError(
            f"{path} was made by `kdpipe store transcode`, which rounded {', '.join(manifest.rounded)}: rounded "
            "numbers cannot be recomputed. Transcode the original store again."
        )
    planned = plan_store(config, teacher, layers_of(manifest), samples_in_row_order(context), context)
    require_same_origin(path, manifest, replace(planned, codec=manifest.codec))
