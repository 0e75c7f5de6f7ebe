"""Plan of a store before the teacher runs: arrays, units, bytes and disk space."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from kdpipe.stages.cache_teacher.cache import CacheJob, row_positions
from kdpipe.stages.cache_teacher.choice import batch_size_of, teacher_of_store
from kdpipe.stages.cache_teacher.inference import hooked_layers, needs_labels
from kdpipe.stages.compute.settings import ComputeSettings, MemoryFormat, Precision
from kdpipe.stages.config import Count, PathStr, section
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import require_classes
from kdpipe.stages.errors import RecipeError, RunError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.models.hooks import overwritten_layers
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.runtime.versions import library_versions
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec, statistic_shapes
from kdpipe.store import (
    ArraySpec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    TopK,
    default_temperatures,
    missing_arrays,
    plan_growth,
    read_store_manifest,
    row_order,
    rows_per_unit,
    store_bytes,
)
from kdpipe.store.format.encodings.head import head_record, read_head
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import Quantized
from kdpipe.store.format.encodings.quantized_maps import quantized_specs
from kdpipe.store.format.encodings.sampled import Sampled
from kdpipe.store.write.acceptance import require_readable

LOGITS = "logits"


Temperature = Annotated[float, Field(ge=0.1, le=100)]


def _ascending(temperatures: tuple[float, float]) -> tuple[float, float]:
    if temperatures[0] > temperatures[1]:
        raise ValueError("the lowest temperature must come first")
    return temperatures


@section
class CacheConfig:
    """Configuration of the target store.

    Attributes:
        layers: Modules of the teacher to store beside the features that the losses require: `layer3` stores its map,
            `layer3:pooled`, `layer3:attention` and `layer3:gram` a statistic of it.
        dtype: The type of logits and features.
        feature_dtype: The type of feature maps, if it is another: "int8" has a range for each row and channel.
        encoding: Store logits with 8 bits a class ("int8") or 4 ("int4"), at any temperature; or the teacher's last
            linear layer once, and of each row the vector that goes into it ("head").
        top_k: Store only the largest logits of a row, and the mass of the rest at any temperature in `temperatures`.
        temperatures: The lowest and highest temperature; a narrow range takes fewer bytes.
        sampled_labels: Store only so many classes of a row, drawn so that the mean over views is the teacher's
            probabilities at T = 1: for losses that are linear in them.
        store: The store's folder; by default `store.zarr` in the run folder.
        precision: How the teacher is computed: in "float32", or in "tf32", "bfloat16" or "float16" where the device has
            it. "auto" is float32 for a small job; for a large one a trial finds the fastest that is faithful, and it is
            recorded in the store. What a store records is used for all that is added to it.
        memory_format: The memory format of images and convolutions: "contiguous", "channels_last" or "auto".
        compile: Whether torch.compile compiles the teacher.
        max_kl: The KL divergence of the teacher's logits from those in float32, in nats, that is accepted: the mean
            over the trial's images, at the lowest and the highest of `temperatures`.
        batch_size: Images per teacher batch. "auto" is 256 for a small job; for a large one the trial finds the
            smallest that is about as fast as any.
        shard_bytes: The approximate size of the widest array's shard files.
    """

    layers: tuple[str, ...] = ()
    dtype: Literal["float16", "float32"] = "float16"
    feature_dtype: Literal["int8"] | None = None
    encoding: Literal["int8", "int4", "head"] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperatures: Annotated[tuple[Temperature, Temperature], AfterValidator(_ascending)] = (1.0, 20.0)
    sampled_labels: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    store: PathStr | None = None
    precision: Literal["auto", Precision] = "auto"
    memory_format: Literal["auto", MemoryFormat] = "auto"
    compile: bool = False
    max_kl: Annotated[float, Field(gt=0, le=1)] = 1e-4
    batch_size: Count | Literal["auto"] = "auto"
    shard_bytes: Annotated[int, Field(ge=4096, le=2**32)] = 64 * 2**20

    @property
    def for_test(self) -> CacheConfig:
        """The configuration of the store of the test images, which has all logits."""
        return replace(self, encoding=None, top_k=None, sampled_labels=None)

    @property
    def settings(self) -> ComputeSettings:
        """How the teacher of a small job is computed."""
        precision: Precision = "float32" if self.precision == "auto" else self.precision
        memory_format: MemoryFormat = "contiguous" if self.memory_format == "auto" else self.memory_format
        return ComputeSettings(precision, memory_format, self.compile)

    @property
    def asked(self) -> dict[str, Any]:
        """What the recipe itself says of how the teacher is computed; a store must not contradict it."""
        given = {"precision": self.precision, "memory_format": self.memory_format}
        chosen: dict[str, Any] = {key: value for key, value in given.items() if value != "auto"}
        return chosen | ({"compile": True} if self.compile else {})


def samples_in_row_order(context: StageContext) -> Samples:
    """Return the training samples in the order of the store's rows: pseudo-random, so that slabs mix classes."""
    return context.samples.take(row_order(context.samples.ids, context.views.seed))


def plan_store(
    config: CacheConfig, teacher: ModelBundle, layers: Sequence[FeatureSpec], samples: Samples, context: StageContext
) -> Manifest:
    """Return the manifest of the store to make.

    That of a teacher without a classifier has embeddings in place of logits.

    Raises ModelError, listing the nearest paths, for an unknown layer, or for a head that cannot be stored; RecipeError
    for an encoding that does not fit; StoreError for a store that readers would refuse.
    """
    encoding = encoding_of(config, context, teacher)
    head = head_to_store(config, teacher, layers, context)
    layers = stored_layers(config, teacher, layers)
    if teacher.is_headless or config.encoding == "head":
        logits: tuple[ArraySpec, ...] = ()
    else:
        num_classes = context.train_set.num_classes
        logits = encoding.arrays(config.dtype) if encoding else (ArraySpec(LOGITS, (num_classes,), config.dtype),)
    if needs_labels(layers) and not context.train_set.is_labeled:
        raise RecipeError(
            "the input gradient is that of the cross entropy with the labels, and some training images have none: "
            "leave it out of cache.layers, or give all labels."
        )
    shapes = statistic_shapes(teacher.model, layers, context.image_shape)
    own = overwritten_layers(teacher.model, hooked_layers(layers), context.image_shape)
    features = [ArraySpec(one.array, shapes[one], config.dtype, one.source in own) for one in layers]
    if config.feature_dtype == "int8":
        features = [pair for spec in features for pair in quantized_specs(spec)]
    specs = (*logits, *features)
    num_samples = len(samples.ids)
    data = {**context.data_identity(), "classes": list(context.train_set.class_names)}
    planned = Manifest(
        identity=Identity(teacher.identity, data, context.view_identity(), config.asked),
        arrays=specs,
        layout=StoreLayout(
            context.views.num_stored, rows_per_unit(specs, num_samples, config.shard_bytes), (num_samples,)
        ),
        versions=library_versions(),
        encoding=encoding,
        named_axes=True,
        head=None if head is None else head_record(head),
    )
    require_readable(planned, "the store")
    return planned


def missing_bytes(path: Path, planned: Manifest, samples: Samples) -> int:
    """Return the bytes that the store at `path` still needs. Raises the same as `plan_growth`."""
    if not path.exists():
        return store_bytes(planned, planned.layout.units()) + head_bytes(planned)
    stored = read_store_manifest(path)
    grown, _ = plan_growth(path, stored, planned, samples)
    return (
        head_bytes(grown)
        - head_bytes(stored)
        + sum(store_bytes(grown, [unit], missing_arrays(path, grown, unit)) for unit in grown.layout.units())
    )


def head_bytes(manifest: Manifest) -> int:
    """Return the bytes of the teacher's head; 0 if the store has none."""
    return manifest.head.num_bytes if manifest.head else 0


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(next(one for one in (path, *path.absolute().parents) if one.exists())).free


def require_room(path: Path, needed: int) -> None:
    """Raise RunError if the store at `path` needs more bytes than its disk has free."""
    free = free_bytes(path)
    if needed > free:
        raise RunError(
            f"the store {path} needs {needed:,} bytes more and its disk has {free:,} free: make room, put cache.store "
            "on another disk, keep less of each layer (cache.layers = ['LAYER:pooled']), or lower views.num_views."
        )


def stored_layers(config: CacheConfig, teacher: ModelBundle, layers: Sequence[FeatureSpec]) -> list[FeatureSpec]:
    """Return the features that have an array: those that stand for logits first."""
    first = [FeatureSpec(PRE_LOGITS)] if teacher.is_headless or config.encoding == "head" else []
    return list(dict.fromkeys([*first, *(one for one in layers if not one.is_head)]))


def head_to_store(
    config: CacheConfig, teacher: ModelBundle, layers: Sequence[FeatureSpec], context: StageContext
) -> NDArray[np.float32] | None:
    """Return the teacher's head [C, D + 1] if it is to be stored. Raises ModelError if it cannot be."""
    is_wanted = config.encoding == "head" or TEACHER_HEAD in layers
    return linear_head(teacher.model, context.image_shape) if is_wanted else None


def encoding_of(config: CacheConfig, context: StageContext, teacher: ModelBundle) -> LogitEncoding | None:
    """Return the encoding of the logits, None for all of them as they are.

    Raises RecipeError if two are set, if k is the number of classes, or if there are no logits of classes.
    """
    given = {key: getattr(config, key) for key in ("encoding", "top_k", "sampled_labels")}
    keys = [f"cache.{key}" for key, value in given.items() if value is not None]
    if not keys:
        return None
    if len(keys) > 1:
        raise RecipeError(f"{keys[0]} and {keys[1]} each say how logits are stored: set one of them.")
    if config.encoding == "head":
        return None
    require_classes(context.train_set, keys[0])
    if teacher.is_headless:
        raise RecipeError(f"{keys[0]} is for logits, and the teacher has embeddings: leave it out.")
    num_classes = context.train_set.num_classes
    if config.encoding is not None:
        return Quantized(config.encoding, num_classes)
    k = config.top_k or config.sampled_labels or 0
    if k >= num_classes:
        raise RecipeError(f"{keys[0]} = {k} keeps all of {num_classes} classes: leave it out, or keep fewer.")
    if config.sampled_labels is not None:
        return Sampled(num_classes, k, context.views.seed)
    return TopK(num_classes, k, default_temperatures(*config.temperatures), config.dtype)


def build_cache_job(
    config: CacheConfig, path: Path, manifest: Manifest, teacher: ModelBundle, context: StageContext
) -> CacheJob:
    """Return the job that fills the store at `path`, whose teacher, views and data set must be these.

    Raises RunError where this device lacks the precision in which the store was begun.
    """
    positions = row_positions(path, manifest, context.samples)
    warn = partial(context.monitor.warn, "cache-teacher")
    teacher = teacher_of_store(teacher, path, manifest, context.device, warn)
    batch_size = batch_size_of(manifest, config.batch_size)
    head = read_head(path, manifest.head) if manifest.head and manifest.logits_from_head else None
    return CacheJob(path, manifest, teacher, context.train_loader, positions, batch_size, context.monitor, head)
