"""`kdpipe store repair`: check a store and recompute exactly what is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

from kdpipe.stages.cache_teacher.cache import fill_store, layers_of
from kdpipe.stages.cache_teacher.choice import with_settings
from kdpipe.stages.cache_teacher.plan import CacheConfig, build_cache_job, plan_store, samples_in_row_order
from kdpipe.stages.compute.settings import ComputeSettings, MemoryFormat, Precision
from kdpipe.stages.context import StageContext
from kdpipe.stages.errors import RunError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec
from kdpipe.store import Manifest, StoreError, read_store_manifest
from kdpipe.store.check.repair import rebuild_manifest, restore_samples, uncommit
from kdpipe.store.check.verify import VerifyReport, verify_store
from kdpipe.store.format.encodings.head import HEAD_KEY, require_head, write_head
from kdpipe.store.format.schema import SAMPLES
from kdpipe.store.format.zarr_metadata import replace_metadata
from kdpipe.store.write.claims import exclusive_store
from kdpipe.store.write.extend import as_older, require_same_origin


def repair(
    config: CacheConfig, path: Path, teacher: ModelBundle, layers: Sequence[FeatureSpec], context: StageContext
) -> tuple[VerifyReport, VerifyReport, int]:
    """Repair the store at `path`.

    Metadata are rewritten from the manifest, and a lost manifest from the recipe's plan (`layers` are the recipe's) if
    the markers agree with it. Samples are restored from the recipe's data set if they are the same. Only damaged arrays
    are recomputed: what was missing stays missing. Open readers are not disturbed. Rerunning finishes a killed repair.

    Returns the faults found, those left, and the number of units computed. Raises FingerprintMismatch, at once, if
    the recipe's teacher, views or data set are not the store's; StoreError if it cannot be repaired; LockedError if
    another job is computing a damaged unit.
    """
    manifest = _manifest(config, path, teacher, layers, context)
    found = verify_store(path, context.monitor.counter("repair", "check", "unit"), manifest=manifest)
    if not found.damaged:
        return found, found, 0
    _require_own(config, path, manifest, teacher, context)
    with exclusive_store(path):
        with suppress(StoreError):  # a lost manifest stays the recipe's plan
            manifest = read_store_manifest(path)  # again: another job may have extended the store meanwhile
        replace_metadata(path, manifest)
        if any(fault.key.startswith(f"{SAMPLES}/") or fault.key == SAMPLES for fault in found.damaged):
            restore_samples(path, manifest, context.samples)
        if any(fault.key == HEAD_KEY for fault in found.damaged):
            head = linear_head(teacher.model, context.image_shape)
            require_head(head, manifest.head, str(path))
            write_head(path, head)
    units = uncommit(path, manifest, found.damaged)
    result = fill_store(build_cache_job(config, path, manifest, teacher, context), sorted(units))
    left = verify_store(path, context.monitor.counter("repair", "check again", "unit"))
    return found, left, int(result["num_units_computed"])


def _manifest(
    config: CacheConfig, path: Path, teacher: ModelBundle, layers: Sequence[FeatureSpec], context: StageContext
) -> Manifest:
    """Return the store's manifest, or the recipe's plan if it is damaged."""
    try:
        return read_store_manifest(path)
    except StoreError:
        if not (path / "markers").is_dir():
            raise
    planned = plan_store(config, teacher, layers, samples_in_row_order(context), context)
    for way in product(get_args(Precision), get_args(MemoryFormat), (False, True), (False, True)):
        with suppress(StoreError):  # the markers' fingerprint covers how the teacher was computed
            return rebuild_manifest(path, with_settings(planned, ComputeSettings(*way), {}))
    return rebuild_manifest(path, planned)  # says why not


def _require_own(
    config: CacheConfig, path: Path, manifest: Manifest, teacher: ModelBundle, context: StageContext
) -> None:
    """Raise unless the store was computed with this teacher, these views and this data set."""
    if manifest.rounded:
        raise RunError(
            f"{path} was made by `kdpipe store transcode`, which rounded {', '.join(manifest.rounded)}: rounded "
            "numbers cannot be recomputed. Transcode the original store again."
        )
    layers = [*layers_of(manifest), *([TEACHER_HEAD] if manifest.head else [])]
    planned = plan_store(config, teacher, layers, samples_in_row_order(context), context)
    require_same_origin(path, manifest, as_older(replace(planned, codec=manifest.codec), manifest))
