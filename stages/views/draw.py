"""Random numbers that depend on (seed, view, operation, sample id) and on nothing else.

A counter-based generator: every number is a hash of its coordinates, so that neither batch size nor order, worker or
device can change it, and no state has to be saved. Drawn on the CPU always: a GPU gets the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = 2**64
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64 (Steele, Lea, Flood 2014)."""


@dataclass(frozen=True)
class Draw:
    """The numbers of a batch of samples in one view: `sample_ids` int64 [B], on the CPU; `seed` and `view` any integer.

    `stream` tells operations apart: each has its own, and numbers its parameters from 0 within it, so that an
    operation more in a recipe leaves the others' numbers alone.
    """

    seed: int
    view: int
    sample_ids: Tensor
    stream: int = 0

    def of(self, stream: int) -> Draw:
        """The numbers of another operation."""
        return replace(self, stream=stream)

    def at(self, rows: Tensor) -> Draw:
        """The numbers of some of the samples: `rows` int64 or bool, on the CPU."""
        return replace(self, sample_ids=self.sample_ids[rows])

    def below(self, bound: int, parameter: int) -> Tensor:
        """Integers in [0, bound), int64 [B], each as likely as the other; `bound` at most 2^31."""
        return torch.from_numpy(((self._bits(parameter) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64))

    def uniform(self, low: float, high: float, parameter: int) -> Tensor:
        """Numbers in [low, high), float64 [B]."""
        share = self._bits(parameter).astype(np.float64) * 2.0**-32
        return torch.from_numpy(low + (high - low) * share)

    def chance(self, probability: float, parameter: int) -> Tensor:
        """True with `probability`, bool [B]."""
        return torch.from_numpy(self._bits(parameter) >= np.uint64(2**32 - round(probability * 2**32)))

    def _bits(self, parameter: int) -> NDArray[np.uint64]:
        """32 random bits for each sample, [B]."""
        key, second = _keys(self.seed, self.view, self.stream + parameter)
        ids = self.sample_ids.numpy().view(np.uint64)
        return _mix(_mix(ids ^ key) + second) >> np.uint64(32)


@lru_cache(1024)
def _keys(seed: int, view: int, number: int) -> tuple[np.uint64, np.uint64]:
    key = mix_integer(mix_integer(mix_integer(seed) + view) + number)
    return np.uint64(key), np.uint64(mix_integer(key))


def mix_integer(x: int) -> int:
    """One step of SplitMix64: an integer to one below 2^64 that looks random."""
    x = (x + _GOLDEN) % _WORD
    x = (x ^ (x >> 30)) * _FIRST % _WORD
    x = (x ^ (x >> 27)) * _SECOND % _WORD
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
