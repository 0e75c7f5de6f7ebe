"""Which test images a network classified correctly: one bit an image, kept with a job's results."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kdpipe.stages.evaluation.intervals import Interval, Outcome
from kdpipe.stages.evaluation.main_metric import main_value, metric_of
from kdpipe.store import ids_and_labels_sha256


@dataclass(frozen=True)
class CorrectImages:
    """Whether each test image was classified correctly.

    Attributes:
        num_images: The number of readable test images.
        bits: One bit an image, by ascending sample id, packed into bytes from the highest bit down, in base64.
        images_sha256: Digest of the images' ids and labels: only networks with the same one can be compared by image.
    """

    num_images: int
    bits: str
    images_sha256: str


def pack(correct: Tensor, sample_ids: Tensor, labels: Tensor) -> CorrectImages:
    """Return which images are correct, bool [N], with their ids and labels, int64 [N]."""
    order = sample_ids.argsort()
    packed = np.packbits(correct[order].numpy())
    digest = ids_and_labels_sha256(sample_ids.numpy(), labels.numpy())
    return CorrectImages(len(correct), base64.b64encode(packed.tobytes()).decode(), digest)


def outcome_of(result: Mapping[str, Any]) -> Outcome:
    """Return the outcome in a job's results; of older jobs less is known.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: If the evaluation in the results is damaged.
    """
    accuracy, examined = main_value(result), result.get("examined")
    if examined is None:
        return Outcome(accuracy)
    kept = examined.get("correct")
    if not metric_of(result).is_share:
        bounds = examined.get("interval")
        return Outcome(accuracy, interval=Interval(float(bounds[0]), float(bounds[1]), "images") if bounds else None)
    if kept is None:
        return Outcome(accuracy, sum(int(one["num_samples"]) for one in examined["per_class"]) or None)
    num, packed = int(kept["num_images"]), base64.b64decode(kept["bits"], validate=True)
    if not 0 < num <= 8 * len(packed) < num + 8:
        raise ValueError(f"{len(packed)} bytes do not hold the bits of {num} images")
    correct = np.unpackbits(np.frombuffer(packed, np.uint8), count=num).astype(np.bool_)
    if abs(float(correct.mean()) - accuracy) > 1e-9:
        raise ValueError(f"{int(correct.sum())} of {num} images are correct, and the accuracy is {accuracy}")
    return Outcome(accuracy, num, correct, str(kept["images_sha256"]))
