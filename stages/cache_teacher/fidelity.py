"""How far the teacher's outputs in a fast precision are from those in float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.feature_spec import FeatureSpec, compute_statistic
from kdpipe.store.format.encodings.encoding_error import row_kl


def compare(
    pairs: Iterable[tuple[ModelOutput, ModelOutput]],
    layers: Sequence[FeatureSpec],
    temperatures: Sequence[float],
    task: Task = CLASSIFICATION,
) -> dict[str, Any] | None:
    """Return the errors of outputs over all batches, as pairs (in float32, to compare); None if they are not finite.

    Without `temperatures` they have no logits. Of other tasks than classification the logits are compared as features.

    Returns:
        num_images, kl (by temperature, the mean of KL(float32 || other) in nats), top1_flips, largest_error of a logit,
        and features (by array, the root mean square of the errors over that of the features).
    """
    logits: tuple[list[Any], list[Any]] = ([], [])
    squares = {feature.array: np.zeros(2) for feature in layers}
    for both in pairs:
        for rows, outputs in zip(logits, both, strict=True):
            rows.append(outputs.logits.double().cpu().numpy())
        for feature in layers:
            own, other = (compute_statistic(feature, outputs.features[feature.source]) for outputs in both)
            squares[feature.array] += [_squared(other - own), _squared(own)]
    exact, found = np.concatenate(logits[0]), np.concatenate(logits[1])
    if not np.isfinite(found).all() or not all(np.isfinite(one).all() for one in squares.values()):
        return None
    if task != CLASSIFICATION:
        squares["logits"] = np.array([np.square(found - exact).sum(), np.square(exact - exact.mean(0)).sum()])
        temperatures = ()
    return {
        "num_images": len(exact),
        "kl": {f"{one:g}": _rounded(row_kl(exact, found, one).mean()) for one in dict.fromkeys(temperatures)},
        "top1_flips": int(np.count_nonzero(exact.argmax(axis=1) != found.argmax(axis=1))),
        "largest_error": _rounded(np.abs(found - exact).max()),
        "features": {name: _rounded((error / max(total, 1e-30)) ** 0.5) for name, (error, total) in squares.items()},
    }


def _squared(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
