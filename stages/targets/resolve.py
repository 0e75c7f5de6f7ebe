"""Find the stored array for a required feature: the feature itself, or a map from which it is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kdpipe.stages.targets.feature_spec import (
    ATTENTION,
    INPUT_GRADIENT,
    MAP,
    SPATIAL_GRAM,
    FeatureSpec,
    Shape,
    compute_statistic,
    statistic_shape,
)
from kdpipe.store import StoreError, TargetStore

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
    for candidate in (feature, replace(feature, size=None)):
        array = candidate.array
        if array in shapes and (candidate == feature or fits(shapes[array], feature)):
            return FeatureSource(feature, array, None, shapes[array])
    whole = FeatureSpec(feature.layer, MAP)
    if whole.array in shapes and feature.statistic != INPUT_GRADIENT:
        computed = feature.for_shape(shapes[whole.array])
        return FeatureSource(feature, whole.array, computed, statistic_shape(computed, shapes[whole.array]))
    raise StoreError(
        f"{store.path} has no {feature.kind} of {feature.layer!r}, only {', '.join(shapes)}: run "
        "`kdpipe cache-teacher` with this recipe to add it, or with the one that made the store and "
        f"cache.layers = ['{feature}'] (in Python: kdpipe.cache_teacher(..., features=['{feature}']))."
    )


def arrays_needed(store: TargetStore, features: Sequence[FeatureSpec]) -> list[str]:
    """Return the arrays with a store's logits and the required features. Raises like `resolve_feature`."""
    logits = [spec.name for spec in store.arrays if spec.name.startswith(LOGITS)]
    return list(dict.fromkeys([*logits, *[resolve_feature(store, feature).array for feature in features]]))


def smallest_feature(feature: FeatureSpec, shape: Shape) -> FeatureSpec:
    """Return what to store of a layer whose outputs have `shape` for a required feature: it, or the map if not larger.

    Input gradients cannot be computed from a map.
    """
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
