"""Stage 1, `kdpipe cache-teacher`: run the teacher once over every view and keep what it says in a target store."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.errors import NotFiniteError, RunError
from stages.features import Outputs, Tap, feature_shapes, tapped
from stages.network import Network
from stages.setup import Setup, samples_of
from stages.targets import LOGITS, feature_array
from stages.views import render
from stages.watch import Event
from store import (
    ArraySpec,
    Identity,
    Manifest,
    Unit,
    all_units,
    create_store,
    exclusive,
    missing_units,
    require_same,
    rows_per_unit,
    store_bytes,
    sweep_partial,
    write_unit,
)


@section
class CacheConfig:
    """What is stored and how.

    layers: modules of the teacher whose feature maps are kept, beside those that the recipe's losses ask for.
    store: the store's folder; by default `store` in the run folder.
    shard_bytes: about how large the widest array's shard files are.
    """

    layers: tuple[str, ...] = ()
    dtype: Literal["float16", "float32"] = "float16"
    store: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 256
    shard_bytes: Annotated[int, Field(ge=4096, le=2**32)] = 64 * 2**20


def cache_teacher(
    config: CacheConfig, path: Path, teacher: Network, layers: Sequence[str], setup: Setup
) -> dict[str, Any]:
    """Fill the store at `path` with the teacher's logits and the feature maps of `layers`, for every view.

    Work is done and committed unit by unit; a killed job's successor computes only what no marker says is done, and
    the store ends with the very bytes of an undisturbed run. Returns the store's size. Raises FingerprintMismatch if
    the store at `path` is another one, NotFiniteError naming the samples whose outputs are not finite, RunError if
    the disk is too small, StoppedEarly between batches when the stop flag is set.
    """
    manifest = plan_store(config, teacher, layers, setup)
    with exclusive(path, path.with_name(f".{path.name}.lock")):
        sweep_partial(path)
        if path.exists():
            require_same(path, manifest)
        else:
            _require_room(path, store_bytes(manifest, _units(manifest)))
            create_store(path, manifest, samples_of(setup.train_set))
        num_computed = _fill(config, path, teacher, manifest, setup)
    return {
        "path": str(path),
        "fingerprint": manifest.identity.fingerprint,
        "num_views": manifest.num_views,
        "num_samples": manifest.num_samples,
        "arrays": {spec.name: spec.to_json() for spec in manifest.arrays},
        "store_bytes": store_bytes(manifest, _units(manifest)),
        "num_units_computed": num_computed,
    }


def plan_store(config: CacheConfig, teacher: Network, layers: Sequence[str], setup: Setup) -> Manifest:
    """What the store will be. Raises ModelError, listing the nearest paths, for a layer that the teacher lacks."""
    shapes = feature_shapes(teacher.model, layers, setup.image_shape)
    specs = [ArraySpec(LOGITS, (setup.train_set.num_classes,), config.dtype)]
    specs += [ArraySpec(feature_array(layer), shapes[layer], config.dtype) for layer in layers]
    num_samples = setup.train_set.num_samples
    return Manifest(
        identity=Identity(teacher.identity, setup.data_identity(), setup.view_identity()),
        arrays=tuple(specs),
        num_views=setup.views.num_views,
        num_samples=num_samples,
        unit_rows=rows_per_unit(specs, num_samples, config.shard_bytes),
        versions={name: version(name) for name in ("kdpipe", "torch", "torchvision", "zarr", "numpy")},
    )


def _units(manifest: Manifest) -> list[Unit]:
    return all_units(manifest.num_views, manifest.num_samples, manifest.unit_rows)


def _fill(config: CacheConfig, path: Path, teacher: Network, manifest: Manifest, setup: Setup) -> int:
    """Compute and commit every unit that is missing; returns how many those were."""
    units, missing = _units(manifest), missing_units(path, manifest)
    _require_room(path, store_bytes(manifest, missing))
    layers = [spec.name.removeprefix("features/") for spec in manifest.arrays if spec.name != LOGITS]
    with torch.inference_mode(), tapped(teacher.model, layers) as tap:
        for done, unit in enumerate(missing, len(units) - len(missing) + 1):
            batches = _speak(tap, teacher, unit, config.batch_size, setup)
            written = write_unit(path, manifest, unit, _collect(batches, manifest, unit))
            metrics = {"unit_bytes": written}
            setup.watch.report(Event("cache-teacher", "store", done, len(units), "unit", metrics))
    return len(missing)


def _speak(tap: Tap, teacher: Network, unit: Unit, batch_size: int, setup: Setup) -> Iterator[tuple[Tensor, Outputs]]:
    """Ids and outputs, batch by batch. Batches begin with the unit, so that its bytes are the same in every job."""
    for start in range(unit.start, unit.stop, batch_size):
        setup.watch.check()
        at = slice(start, min(start + batch_size, unit.stop))
        images, ids = setup.train_set.images[at].to(setup.device), setup.train_set.sample_ids[at].to(setup.device)
        yield ids, tap(teacher.normalise(render(images, ids, unit.view, setup.views)))


def _collect(
    batches: Iterable[tuple[Tensor, Outputs]], manifest: Manifest, unit: Unit
) -> dict[str, NDArray[np.floating]]:
    """The rows of a unit, by array, in the store's types."""
    rows = {spec.name: np.empty((unit.num_rows, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
    start = 0
    for ids, outputs in batches:
        for name, values in _arrays(outputs).items():
            rows[name][start : start + len(ids)] = _narrow(name, values, manifest.spec(name).dtype, ids, unit)
        start += len(ids)
    return rows


def _arrays(outputs: Outputs) -> Mapping[str, Tensor]:
    return {LOGITS: outputs.logits, **{feature_array(layer): maps for layer, maps in outputs.features.items()}}


def _narrow(name: str, values: Tensor, dtype: str, sample_ids: Tensor, unit: Unit) -> NDArray[np.floating]:
    """A batch of outputs [B, ...] in the store's type. Raises NotFiniteError, naming samples, for NaN and overflow."""
    narrow = values.to(getattr(torch, dtype))
    bad = ~torch.isfinite(narrow).flatten(1).all(1)
    if bad.any():
        named = sample_ids[bad][:5].tolist()
        if torch.isfinite(values).all():
            largest = float(values.abs().max())
            raise NotFiniteError(
                f"{name} of samples {named} in view {unit.view} reach {largest:.4g}, beyond {dtype}'s range: "
                "set cache.dtype = 'float32'."
            )
        raise NotFiniteError(
            f"the teacher gave NaN or infinity as {name} of samples {named} in view {unit.view}: "
            "look at these images and at the teacher's weights and normalisation."
        )
    array: NDArray[np.floating] = narrow.cpu().numpy()
    return array


def _require_room(path: Path, needed: int) -> None:
    """Raise RunError before any work is spent if the disk cannot hold what is missing."""
    folder = next(one for one in (path, *path.absolute().parents) if one.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"the store {path} needs {needed:,} bytes more and its disk has {free:,} free: make room, put cache.store "
            "on another disk, or lower views.num_views or cache.layers."
        )
