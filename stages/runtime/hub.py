"""The Hugging Face hub, from which timm, transformers and datasets load: asked once whether it answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdpipe.stages.errors import cause

CONNECT_TIMEOUT_S = 10.0
VALID_S = 60.0
"""For how long an answer holds: a job asks for several files, a notebook's network may come back."""

_answers: dict[str, tuple[float, str]] = {}
"""Per address of a hub when it was asked, and why it could not be reached, "" if it could."""


@contextmanager
def hub_or_cache(refused: str = "", *, local: bool = False) -> Iterator[str]:
    """Let libraries use the hub's cache alone where the hub cannot be asked; yield why, "" if it can.

    Left to themselves they try for half a minute a file, and print each attempt.

    Args:
        refused: Why the hub is not to be asked, if so.
        local: Whether nothing of the hub is needed, and nothing is changed here.
    """
    if local:
        yield ""
        return
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else refused or _unreachable(constants.ENDPOINT)
    places: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places if why else ():
        place.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _unreachable(endpoint: str) -> str:
    """Return why the hub cannot be reached, "" if it can."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    asked, why = _answers.get(endpoint, (-VALID_S, ""))
    if time.monotonic() - asked < VALID_S:
        return why
    try:
        get_session().head(endpoint, timeout=CONNECT_TIMEOUT_S)
        why = ""
    except Exception as error:  # of httpx or requests, by the version of the hub's client
        why = f"{endpoint} cannot be reached: {cause(error)}"
    _answers[endpoint] = time.monotonic(), why
    return why


def hub_cause(error: BaseException, why: str = "") -> str:
    """Return why a library could not load: `why` the hub could not be asked, or the first sentence of its error.

    The other sentences are the library's own advice.
    """
    return why if why and isinstance(error, OSError) else cause(error).split(". ")[0].rstrip(".")
