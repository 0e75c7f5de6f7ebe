"""Find the stored array for a required feature: the feature itself, or a map from which it is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kdpipe.stages.targets.feature_spec import (
    ATTENTION,
    HEAD,
    INPUT_GRADIENT,
    MAP,
    SPATIAL_GRAM,
    FeatureSpec,
    Shape,
    compute_statistic,
    statistic_shape,
)
from kdpipe.store import StoreError, TargetStore
from kdpipe.store.format.encodings.head import HEAD as HEAD_ARRAY
from kdpipe.store.format.encodings.quantized_maps import is_quantized, quantized_specs
from kdpipe.store.format.manifest import EMBEDDINGS

LOGITS = "logits"

SPATIAL = (MAP, ATTENTION)
"""Statistics whose arrays have the maps' height and width; the names of others must give the size of pooled maps."""


@dataclass(frozen=True)
class FeatureSource:
    """The source of a required feature in a store.

    Attributes:
        feature: The required feature.
        array: The name of the array to read.
        computed: The statistic to compute from the array; None to use it as it is.
        shape: The feature's shape, without the batch axis.
    """

    feature: FeatureSpec
    array: str
    computed: FeatureSpec | None
    shape: Shape

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute the feature, [B, *shape], from rows of the array, [B, ...]."""
        return rows if self.computed is None else compute_statistic(self.computed, rows)


def resolve_feature(store: TargetStore, feature: FeatureSpec) -> FeatureSource:
    """Find the source of a required feature in a store.

    Raises:
        StoreError: The store has none; the message has the command that adds it.
    """
    shapes = {spec.name: spec.row_shape for spec in store.arrays}
    head = store.manifest.head
    shapes |= {HEAD_ARRAY: head.shape} if head else {}
    for candidate in (feature, replace(feature, size=None)):
        array = candidate.array
        if array in shapes and (candidate == feature or fits(shapes[array], feature)):
            return FeatureSource(feature, array, None, shapes[array])
    whole = FeatureSpec(feature.layer, MAP)
    if whole.array in shapes and feature.statistic not in (INPUT_GRADIENT, HEAD):
        computed = feature.for_shape(shapes[whole.array])
        return FeatureSource(feature, whole.array, computed, statistic_shape(computed, shapes[whole.array]))
    raise StoreError(
        f"{store.path} has no {feature.kind} of {feature.layer!r}, only {', '.join(shapes)}: run "
        "`kdpipe cache-teacher` with this recipe to add it, or with the one that made the store and "
        f"cache.layers = ['{feature}'] (in Python: kdpipe.cache_teacher(..., features=['{feature}']))."
    )


def arrays_needed(store: TargetStore, features: Sequence[FeatureSpec]) -> list[str]:
    """Return the arrays with a store's logits and the required features, [V, N, ...]. Raises like `resolve_feature`."""
    logits = [spec.name for spec in store.arrays if spec.name.startswith(LOGITS)]
    logits = logits or [EMBEDDINGS] * store.manifest.logits_from_head
    found = [resolve_feature(store, feature).array for feature in features]
    return list(dict.fromkeys([*logits, *stored_parts(store, [array for array in found if array != HEAD_ARRAY])]))


def stored_parts(store: TargetStore, arrays: Iterable[str]) -> list[str]:
    """Return the arrays of features with the ranges of those that are feature maps of 8 bits."""
    specs = [store.spec(array) for array in arrays]
    return [part.name for spec in specs for part in (quantized_specs(spec) if is_quantized(spec) else (spec,))]


def smallest_feature(feature: FeatureSpec, shape: Shape) -> FeatureSpec:
    """Return what to store of a layer whose outputs have `shape` for a required feature: it, or the map if not larger.

    Input gradients and the head cannot be computed from a map.
    """
    if feature.is_head:
        return feature
    fitted = feature.for_shape(shape) if feature.statistic in (*SPATIAL, SPATIAL_GRAM) else feature
    keeps_map = math.prod(shape) <= math.prod(statistic_shape(fitted, shape))
    return FeatureSpec(feature.layer, MAP) if keeps_map and feature.statistic != INPUT_GRADIENT else fitted


def fits(shape: Shape, feature: FeatureSpec) -> bool:
    """Return whether an array with rows of `shape`, computed from unpooled maps, fits the required size."""
    if feature.size is None:
        return True
    if feature.statistic == SPATIAL_GRAM:
        return shape[0] <= feature.size[0] * feature.size[1]
    return feature.statistic in SPATIAL and (
        len(shape) < 2 or (shape[-2] <= feature.size[0] and shape[-1] <= feature.size[1])
    )
