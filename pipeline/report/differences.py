"""Differences between the networks of a run, in percentage points, with how sure they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.report.formatting import interval_text, num_seeds
from kdpipe.stages.compress.targets import GRIDS, SCHEMES
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.intervals import Interval, Outcome, difference

Outcomes = Mapping[str, Sequence[Outcome | None]]
"""The outcomes of each kind of network, seed by seed; None of a job that is not finished."""


MIN_P = 0.0005
"""Probabilities below are not printed as numbers."""


@dataclass(frozen=True)
class NetworkDifference:
    """The percentage points that a network's test accuracy is above another's.

    Attributes:
        kind: The network.
        against: The kind of the other one.
        points: The mean over seeds.
        interval: The 95 % confidence interval: the wider one of that over images and that over seeds. None for one
            seed whose number of test images is not known.
        p: The probability of such a difference between equal networks: McNemar's exact test on the images that only one
            of both has right, for several seeds a test of their mean, over images or seeds as the interval; None where
            the images are not known to be the same.
        paired: Whether the networks were compared image by image.
        num_images: The number of test images.
        num_seeds: The number of seeds.
        is_clear: Whether the interval excludes zero, and p is below 0.05.
    """

    kind: str
    against: str
    points: float
    interval: Interval | None
    p: float | None
    paired: bool
    num_images: int | None
    num_seeds: int
    is_clear: bool

    @property
    def certainty(self) -> str:
        """How sure it is, such as "95 % interval +0.31 to +2.29 over images, p = 0.012; 360 test images, 1 seed"."""
        known = [] if self.interval is None else [f"95 % interval {interval_text(self.interval, signed=True)}"]
        known += [] if self.p is None else [f"p {'= ' if self.p >= MIN_P else ''}{p_text(self.p)}"]
        return "; ".join(filter(None, [", ".join(known), self.basis]))

    @property
    def basis(self) -> str:
        """What it was measured on, such as "360 test images, 1 seed"."""
        images = "" if self.num_images is None else f"{self.num_images:,} test images, "
        return f"{images}{num_seeds(self.num_seeds)}"


def p_text(p: float | None) -> str:
    """Return a probability with three digits, "< 0.001", or "-"."""
    return "-" if p is None else f"{p:.3f}" if p >= MIN_P else "< 0.001"


def read_outcomes(results: Mapping[Path, Mapping[str, Any] | None]) -> list[Outcome | None]:
    """Return the outcome of each job, given by its folder; None of one that is not finished.

    Raises:
        RunError: If an evaluation is damaged.
    """
    found: list[Outcome | None] = []
    for job, result in results.items():
        try:
            found.append(None if result is None else outcome_of(result))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(
                f"the 'examined' entry of result.json in {job} is damaged ({error!r}): delete the damaged folder and "
                "run the recipe again."
            ) from error
    return found


def between(outcomes: Outcomes, kind: str, against: str) -> NetworkDifference | None:
    """Return the difference over the seeds that both networks have; None if there is none."""
    first, second = outcomes.get(against, ()), outcomes.get(kind, ())
    if len(first) > 1 and len(second) > 1:  # a teacher is one for all seeds
        both = [pair for pair in zip(first, second, strict=False) if None not in pair]
        first, second = [one for one, _ in both], [other for _, other in both]
    known = [[one for one in side if one is not None] for side in (first, second)]
    if not all(known):
        return None
    found = difference(*known)
    return NetworkDifference(
        kind=kind,
        against=against,
        points=100 * found.value,
        interval=found.interval.in_percent if found.interval else None,
        p=found.p,
        paired=found.paired,
        num_images=found.num_images,
        num_seeds=found.num_seeds,
        is_clear=found.is_clear,
    )


def differences_of(outcomes: Outcomes) -> list[NetworkDifference]:
    """Return the differences of interest: each network's to the one that it is made from, or to hard labels alone."""
    return [found for pair in _pairs(outcomes) if (found := between(outcomes, *pair)) is not None]


def _pairs(kinds: Outcomes) -> Iterator[tuple[str, str]]:
    """Yield kinds with the kind that each is compared with."""
    for kind in kinds:
        if kind in ("teacher", "student"):
            yield kind, "alone"
        elif kind.endswith("-alone"):
            yield kind.removesuffix("-alone"), kind
        elif kind != "alone":
            is_last = kind in (*SCHEMES, *(f"int8-{target}" for target in GRIDS)) and "pruned" in kinds
            yield kind, "pruned" if is_last else "student"
