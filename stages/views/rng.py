"""Counter-based random numbers that depend only on (seed, view, operation, sample id).

Every number is a hash of its coordinates, so that batch size, order, worker and device cannot change it, and no state
has to be saved. Numbers are always drawn on the CPU: a GPU gets the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15 - _WORD
"""SplitMix64's increment (Steele, Lea, Flood 2014), as int64."""

_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - _WORD, 0x94D049BB133111EB - _WORD


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of a batch of samples in one view.

    Attributes:
        seed: Any integer.
        view: Any integer.
        sample_ids: int64 [B], on the CPU.
        stream: Separates operations: each numbers its parameters from 0 within its own stream, so that adding an
            operation to a recipe does not change the others' numbers.
    """

    seed: int
    view: int
    sample_ids: Tensor
    stream: int = 0

    def fork(self, stream: int) -> CounterRNG:
        """Return the numbers of another operation."""
        return replace(self, stream=stream)

    def at(self, rows: Tensor) -> CounterRNG:
        """Return the numbers of some samples: `rows` int64 or bool, on the CPU."""
        return replace(self, sample_ids=self.sample_ids[rows])

    def integers(self, bound: int, parameter: int) -> Tensor:
        """Draw uniform integers in [0, bound), int64 [B]; `bound` at most 2^31."""
        return (self._bits(parameter) * bound) >> 32

    def uniform(self, low: float, high: float, parameter: int) -> Tensor:
        """Draw uniform numbers in [low, high), float64 [B]."""
        share = self._bits(parameter).numpy().astype(np.float64) * 2.0**-32
        return torch.from_numpy(low + (high - low) * share)

    def bernoulli(self, probability: float, parameter: int) -> Tensor:
        """Draw True with `probability`, bool [B]."""
        return self._bits(parameter) >= 2**32 - round(probability * 2**32)

    def _bits(self, parameter: int) -> Tensor:
        """Return 32 random bits for each sample, as int64 [B]."""
        key, second = _keys(self.seed, self.view, self.stream + parameter)
        return splitmix64(splitmix64(self.sample_ids ^ key) + second) >> 32 & 0xFFFFFFFF


@lru_cache(1024)
def _keys(seed: int, view: int, number: int) -> tuple[int, int]:
    key = mix_integers(seed, view, number)
    return _signed(key), _signed(mix_integers(key))


def mix_integers(first: int, *others: int) -> int:
    """Hash integers of any size to one in [0, 2^64), by one step of SplitMix64 for each."""
    word = _next_word(first)
    for other in others:
        word = _next_word(word + other)
    return word


def _next_word(x: int) -> int:
    x = (x + GOLDEN) % _WORD
    x = (x ^ (x >> 30)) * _FIRST % _WORD
    x = (x ^ (x >> 27)) * _SECOND % _WORD
    return x ^ (x >> 31)


def splitmix64(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function to int64 words, taken as unsigned, of any shape."""
    x = _xor_shifted(x, 30).mul_(_FIRST)
    x = _xor_shifted(x, 27).mul_(_SECOND)
    return _xor_shifted(x, 31)


def _xor_shifted(x: Tensor, by: int) -> Tensor:
    """Return x ^ (x >> by) with zeros shifted in: torch's own shift copies the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1).bitwise_xor_(x)


def _signed(x: int) -> int:
    """Return the int64 with the bits of an unsigned number."""
    return x - _WORD if x >= _WORD // 2 else x
