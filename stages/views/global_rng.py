"""Seed and restore the global random generators of torch, numpy and `random`, which transforms draw from.

Seeding all three takes about 7 us, saving and restoring them 35 us, mostly for numpy's state: a caller that renders
many samples in a row should save them once around all.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from kdpipe.stages.views.rng import mix_integers

_STREAM = 10 << 8
"""Separates these numbers from those of the tensor engine: never change it, or stores replay different views."""

_WORD = 2**64

_numpy_words = np.random.MT19937(0)
"""Swapped into numpy's global generator, whose own is set aside meanwhile: cheaper than copying its state."""

_preserved = False


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global generators' present states at the end; a nested block does nothing.

    Only torch's CPU generator is restored. The generators belong to the process: do not use two threads at once.
    """
    global _preserved  # noqa: PLW0603 - as global as the generators
    if _preserved:
        yield
        return
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_state, numpy_words = np.random.get_state(legacy=False), get_bit_generator()
    _preserved = True
    try:
        yield
    finally:
        _preserved = False
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)
        set_bit_generator(numpy_words)
        if numpy_state["has_gauss"]:  # the second normal number of a pair, which swapping loses
            np.random.set_state(numpy_state)


def seed_global_rngs(seed: int, sample_id: int, view: int) -> None:
    """Seed the generators by a hash of any three integers. Call it within `preserve_rng_state`."""
    word = mix_integers(mix_integers(seed, view, _STREAM) ^ (sample_id % _WORD))
    torch.default_generator.manual_seed(word)  # which uses the lower half
    set_bit_generator(_numpy_words)  # again, since a transform may have swapped it
    np.random.seed(word >> 32)
    random.seed(word)
