"""What can go wrong in a way that a user can mend: each error is one clear sentence, shown without a traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


class KdpipeError(Exception):
    """A fault that the user can mend. Its text says what, where, stored against wanted, and what to do next."""


class StoreError(KdpipeError):
    """A target store cannot be used: damaged, incomplete, or not a store at all."""


class FingerprintMismatch(KdpipeError):
    """Something on disk was made from other inputs than the ones wanted now.

    `differences` holds (key, stored, wanted), one for each value that differs.
    """

    def __init__(self, what: str, differences: Sequence[tuple[str, Any, Any]], advice: str) -> None:
        self.differences = tuple(differences)
        pairs = "; ".join(
            f"{key}: stored {_shown(stored)}, wanted {_shown(wanted)}" for key, stored, wanted in differences
        )
        super().__init__(f"{what} was made from other inputs - {pairs}. {advice}")


def _shown(value: Any) -> str:
    """A value for people: of a digest its beginning, which tells it from another one as well."""
    text = repr(value)
    return f"{text[:13]}...'" if re.fullmatch("'[0-9a-f]{64}'", text) else text


def differences(stored: Any, wanted: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves at which two JSON values differ, as (dotted key, stored, wanted); an absent one reads None."""
    if isinstance(stored, list | tuple) and isinstance(wanted, list | tuple) and len(stored) == len(wanted):
        stored, wanted = dict(enumerate(stored)), dict(enumerate(wanted))
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*stored, *wanted})
        return [
            pair
            for name in names
            for pair in differences(stored.get(name), wanted.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if stored == wanted else [(key, stored, wanted)]
