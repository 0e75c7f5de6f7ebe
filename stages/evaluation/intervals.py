"""Confidence intervals of accuracies, and of differences between networks on the same test images.

An accuracy varies with the test images and with the seed. Each interval is that of the two which is wider, and says
which: over images, or over seeds. The functions agree with those of scipy.stats, which takes a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import mean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""The confidence level of all intervals; a difference is clear if its p is below 1 - LEVEL."""

Over = Literal["images", "seeds"]


@dataclass(frozen=True)
class Interval:
    """A confidence interval. over: what varied, "images" or "seeds"."""

    low: float
    high: float
    over: Over

    @property
    def in_percent(self) -> Interval:
        return Interval(100 * self.low, 100 * self.high, self.over)


@dataclass(frozen=True)
class Outcome:
    """A network's outcome on the test images.

    Attributes:
        accuracy: In [0, 1].
        num_images: The number of test images; None if it is not known.
        correct: Whether each image was classified correctly, bool [N], by ascending sample id; None if not kept.
        images: Digest of these images.
        interval: That over the images, of what is no share of them.
    """

    accuracy: float
    num_images: int | None = None
    correct: NDArray[np.bool_] | None = None
    images: str | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Difference:
    """The accuracy of a network less that of another, in [-1, 1].

    Attributes:
        value: The mean over the seeds.
        interval: None for a single seed without the number of test images.
        p: Two-sided; None where the images are not known to be the same.
        paired: Whether both networks were compared image by image.
        num_images: The number of test images; None if it is not known.
        num_seeds: The number of seeds.
    """

    value: float
    interval: Interval | None
    p: float | None
    paired: bool
    num_images: int | None
    num_seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero, and the test agrees."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return False
        return self.p is None or self.p < 1 - LEVEL


def wilson(share: float, num: int) -> Interval:
    """Return Wilson's score interval of a share of `num` images: Wilson 1927, doi 10.1080/01621459.1927.10502953."""
    z = _z()
    center, scale = share + z * z / (2 * num), 1 + z * z / num
    half = z * (share * (1 - share) / num + z * z / (4 * num * num)) ** 0.5
    return Interval(max((center - half) / scale, 0.0), min((center + half) / scale, 1.0), "images")


def t_interval(values: Sequence[float]) -> tuple[Interval, float]:
    """Return Student's interval of the mean of at least two seeds, and the p of the mean being zero."""
    from scipy.special import stdtr, stdtrit

    center, error, freedom = mean(values), stdev(values) / len(values) ** 0.5, len(values) - 1
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(center) / error)) if error else float(center == 0)
    return Interval(center - half, center + half, "seeds"), p


def mcnemar(num_gained: int, num_lost: int) -> float:
    """Return the p of McNemar's exact test: images that only the second, or only the first network has right."""
    from scipy.special import bdtr

    both = num_gained + num_lost
    return min(1.0, 2 * float(bdtr(min(num_gained, num_lost), both, 0.5))) if both else 1.0


def accuracy_interval(outcomes: Sequence[Outcome]) -> Interval | None:
    """Return the interval of the mean accuracy over seeds; None for one seed without the number of test images."""
    accuracies, num_images = [one.accuracy for one in outcomes], outcomes[0].num_images
    found = [wilson(mean(accuracies), num_images)] if num_images else []
    if over_images := [one.interval for one in outcomes if one.interval is not None]:  # the images are the same
        low, high = (mean(getattr(one, side) for one in over_images) for side in ("low", "high"))
        found.append(Interval(low, high, "images"))
    if len(accuracies) > 1:
        over_seeds, _ = t_interval(accuracies)
        least = 0.0 if num_images else -math.inf
        found.append(Interval(max(over_seeds.low, least), min(over_seeds.high, 1.0), "seeds"))
    return max(found, key=_width, default=None)


def difference(first: Sequence[Outcome], second: Sequence[Outcome]) -> Difference:
    """Return the accuracy of `second` less that of `first`, seed by seed; a single outcome meets every seed.

    Raises:
        ValueError: Both have several outcomes, and not the same number.
    """
    pairs = _paired(first, second)
    values = [other.accuracy - one.accuracy for one, other in pairs]
    gained = _gained(pairs)
    found: list[tuple[Interval, float | None]] = []
    if gained is not None:
        found.append(_over_images(gained, len(pairs)))
    elif all(outcome.num_images for pair in pairs for outcome in pair):
        found.append((_unpaired(pairs), None))
    if len(values) > 1:
        found.append(t_interval(values))
    interval, p = max(found, key=lambda one: _width(one[0]), default=(None, None))
    return Difference(mean(values), interval, p, gained is not None, pairs[0][1].num_images, len(pairs))


def _paired(first: Sequence[Outcome], second: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    if len(first) == 1:
        return list(zip(repeat(first[0]), second, strict=False))
    if len(second) == 1:
        return list(zip(first, repeat(second[0]), strict=False))
    return list(zip(first, second, strict=True))


def _gained(pairs: Sequence[tuple[Outcome, Outcome]]) -> NDArray[np.float64] | None:
    """Return what each image gained, -1 to 1, the mean over seeds; None if the images are not known to be the same."""
    outcomes = [outcome for pair in pairs for outcome in pair]
    if outcomes[0].images is None or len({outcome.images for outcome in outcomes}) > 1:
        return None
    total = np.zeros(outcomes[0].num_images or 0)
    for one, other in pairs:
        if one.correct is None or other.correct is None:
            return None
        total += other.correct.astype(np.float64) - one.correct
    return total / len(pairs)


def _over_images(gained: NDArray[np.float64], num_seeds: int) -> tuple[Interval, float]:
    """Return the interval and p of what the images gained.

    The interval is that of Bonett and Price 2012 (doi 10.3102/1076998611411915): Wald's, with one image more won and
    one more lost, of several seeds by one of them, so that it is not empty where no image changed. The p of one seed is
    McNemar's exact one.
    """
    from scipy.special import ndtr

    num = len(gained) + 2
    center = float(gained.sum()) / num
    error = ((float((gained**2).sum()) + 2 / num_seeds**2) / num - center**2) ** 0.5 / num**0.5
    interval = Interval(max(center - _z() * error, -1.0), min(center + _z() * error, 1.0), "images")
    if num_seeds == 1:
        return interval, mcnemar(int((gained > 0).sum()), int((gained < 0).sum()))
    return interval, 2 * float(ndtr(-abs(center) / error))


def _unpaired(pairs: Sequence[tuple[Outcome, Outcome]]) -> Interval:
    """Return Newcombe's interval, from two of Wilson's: Newcombe 1998, doi 10.1002/(sici)1097-0258(19980430)17:8."""
    one, other = (mean(outcome.accuracy for outcome in side) for side in zip(*pairs, strict=True))
    low, high = (wilson(share, side.num_images or 1) for share, side in zip((one, other), pairs[0], strict=True))
    below = ((other - high.low) ** 2 + (low.high - one) ** 2) ** 0.5
    above = ((high.high - other) ** 2 + (one - low.low) ** 2) ** 0.5
    return Interval(other - one - below, other - one + above, "images")


def _width(interval: Interval) -> float:
    return interval.high - interval.low


def _z() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))
