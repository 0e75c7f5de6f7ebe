"""The three global generators that transforms draw from, torch's, numpy's and random's: seeded for one view of one
sample, and put back.

Seeding all three costs some 7 us, keeping and putting them back some 35, most of it for numpy's state: whoever renders
many samples in a row keeps them once, around the whole row.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from stages.views.draw import mix_integer

_STREAM = 10 << 8
"""Tells these numbers from those of the tensor engine's operations: never change it, or stores replay others."""

_WORD = 2**64

_numpy_words = np.random.MT19937(0)
"""Lent to numpy's global generator, whose own is left alone meanwhile: to swap the two is cheaper than to copy."""

_kept = False


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators back, at the end, to the states that they have now. Within another such block: do nothing.

    Only torch's CPU generator is touched. They are the process's: not for two threads at once.
    """
    global _kept  # noqa: PLW0603 - as global as the generators
    if _kept:
        yield
        return
    python, torchs = random.getstate(), torch.default_generator.get_state()
    numpys, numpy_words = np.random.get_state(legacy=False), get_bit_generator()
    _kept = True
    try:
        yield
    finally:
        _kept = False
        random.setstate(python)
        torch.default_generator.set_state(torchs)
        set_bit_generator(numpy_words)
        if numpys["has_gauss"]:  # the second normal number of a pair, which swapping drops
            np.random.set_state(numpys)


def seed_generators(seed: int, sample_id: int, view: int) -> None:
    """Seed the generators by a hash of any three integers. To be called within `generators_kept`."""
    key = mix_integer(mix_integer(mix_integer(seed) + view) + _STREAM)
    word = mix_integer(key ^ (sample_id % _WORD))
    torch.default_generator.manual_seed(word)  # of which it takes the lower half
    set_bit_generator(_numpy_words)  # again, for a transform may have swapped it
    np.random.seed(word >> 32)
    random.seed(word)
