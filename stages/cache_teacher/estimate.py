"""Estimate of the size and time of `cache-teacher`, for `kdpipe plan`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.stages.cache_teacher.choice import DEFAULT_BATCH_SIZE, batch_size_of, settings_of
from kdpipe.stages.cache_teacher.inference import hooked_layers, iter_teacher_outputs
from kdpipe.stages.cache_teacher.plan import CacheConfig, free_bytes, head_bytes, plan_store, samples_in_row_order
from kdpipe.stages.compute.settings import ComputeSettings
from kdpipe.stages.compute.threads import CheckedThreads, max_threads
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import Manifest, Unit, missing_arrays, plan_growth, read_store_manifest, store_bytes
from kdpipe.store.format.identity import PLAIN

NUM_PROBES = 4
"""Batches of which the teacher's speed is measured; the first one is a warm-up."""


def plan_cache(
    config: CacheConfig,
    path: Path,
    teacher: ModelBundle,
    layers: Sequence[FeatureSpec],
    context: StageContext,
    *,
    trained: bool,
) -> dict[str, Any]:
    """Return what the store has, what is missing, and its size on disk, without writing anything.

    If the teacher is not `trained` yet, it is taken for the teacher of an existing store. Raises FingerprintMismatch if
    the store at `path` was made from other inputs.
    """
    samples = samples_in_row_order(context)
    manifest = plan_store(config, teacher, layers, samples, context)
    missing_bytes = head_bytes(manifest)
    if path.exists():
        stored = read_store_manifest(path)
        if not trained:
            identity = replace(manifest.identity, teacher=stored.identity.teacher)
            manifest = replace(manifest, identity=identity, head=manifest.head and (stored.head or manifest.head))
        manifest, _ = plan_growth(path, stored, manifest, samples)
        missing_bytes = head_bytes(manifest) - head_bytes(stored)
    units = manifest.layout.units()
    missing = {unit: names for unit in units if (names := missing_arrays(path, manifest, unit))}
    missing_bytes += sum(store_bytes(manifest, [unit], names) for unit, names in missing.items())
    return {
        "store": str(path),
        "exists": path.exists(),
        "num_views": manifest.layout.num_views,
        "num_samples": manifest.layout.num_samples,
        "unit_rows": manifest.layout.unit_rows,
        "num_units": len(units),
        "num_units_missing": len(missing),
        "arrays": {spec.name: _array(manifest, spec.name, units, missing) for spec in manifest.arrays},
        "head": manifest.head and {"shape": list(manifest.head.shape), "store_bytes": manifest.head.num_bytes},
        "store_bytes": store_bytes(manifest, units) + head_bytes(manifest),
        "missing_bytes": missing_bytes,
        "free_bytes": free_bytes(path),
        "compute": _compute(config, manifest, exists=path.exists()),
        "num_images": sum(unit.num_rows for unit in missing),
    }


def _compute(config: CacheConfig, manifest: Manifest, *, exists: bool) -> dict[str, Any]:
    """Return how the teacher is computed, as far as that is known: where "auto" stands, a large job's trial decides."""
    if exists:
        return {
            **settings_of(manifest).to_json(),
            "batch_size": batch_size_of(manifest, config.batch_size),
            "trial": dict(manifest.trial),
        }
    given = {"precision": config.precision, "memory_format": config.memory_format, "compile": config.compile}
    return {**given, "batch_size": config.batch_size, "trial": {}}


def known_settings(compute: Mapping[str, Any]) -> ComputeSettings:
    """Return the settings of a plan's `compute`; where "auto" stands, those of a small job."""
    known = {key: value for key, value in compute.items() if value != "auto"}
    return ComputeSettings.from_json({**PLAIN, **known})


def _array(
    manifest: Manifest, name: str, units: Sequence[Unit], missing: dict[Unit, tuple[str, ...]]
) -> dict[str, Any]:
    spec = manifest.spec(name)
    return {
        **spec.to_json(),
        "view_bytes": store_bytes(manifest, manifest.layout.units([0]), [name]),
        "store_bytes": store_bytes(manifest, units, [name]),
        "num_units_missing": sum(name in names for names in missing.values()),
    }


@torch.no_grad()
def probe(
    config: CacheConfig, teacher: ModelBundle, layers: Sequence[FeatureSpec], context: StageContext, num_images: int
) -> dict[str, float]:
    """Measure the teacher's rate on a few batches, rendering and copying included, and extrapolate the total time.

    It is computed as its `compute` says: as the recipe, without a trial.
    """
    wanted = _batch_size(config)
    num_probed = min(context.train_set.num_samples, NUM_PROBES * wanted)
    batch_size = min(wanted, -(-num_probed // 2))
    times_s: list[float] = []
    threads = CheckedThreads(max_threads()) if context.device.type == "cpu" else None
    with (
        teacher.compute.placed(teacher.model),
        torch.autocast(context.device.type, enabled=False),
        extract_features(teacher.model, hooked_layers(layers)) as extractor,
    ):
        for start in range(0, num_probed - batch_size + 1, batch_size):
            started = time.perf_counter()
            request = ViewRequest(torch.arange(start, start + batch_size), 0)
            batches = iter_teacher_outputs(
                extractor,
                teacher,
                [request],
                context.train_loader,
                monitor=context.monitor,
                features=layers,
                threads=threads,
            )
            for _, outputs in batches:
                outputs.logits.float().cpu()
            times_s.append(time.perf_counter() - started)
    rate = batch_size / max(1e-9, min(times_s[1:] or times_s))
    return {"images_per_s": round(rate, 1), "wall_s": round(num_images / rate, 1)}


@torch.no_grad()
def first_logits(config: CacheConfig, teacher: ModelBundle, context: StageContext) -> NDArray[np.float32]:
    """Return the teacher's logits of the first batch in the first view, [n, C]."""
    return first_outputs(config, teacher, context)[0]


@torch.no_grad()
def first_outputs(
    config: CacheConfig, teacher: ModelBundle, context: StageContext, layers: Sequence[str] = ()
) -> list[NDArray[np.float32]]:
    """Return the teacher's logits of the first batch in the first view, [n, C], and the outputs of layers, [n, ...]."""
    request = ViewRequest(torch.arange(min(_batch_size(config), context.train_set.num_samples)), 0)
    with extract_features(teacher.model, layers) as extractor:
        outputs = [
            [found.logits, *[found.features[layer] for layer in layers]]
            for _, found in iter_teacher_outputs(
                extractor,
                teacher,
                [request],
                context.train_loader,
                monitor=context.monitor,
                features=[FeatureSpec(layer) for layer in layers],
            )
        ]
    return [torch.cat([part.float().cpu() for part in parts]).numpy() for parts in zip(*outputs, strict=True)]


def _batch_size(config: CacheConfig) -> int:
    return DEFAULT_BATCH_SIZE if config.batch_size == "auto" else config.batch_size
