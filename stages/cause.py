"""What another library said when it failed, short enough to stand inside one sentence of ours."""

from __future__ import annotations

import textwrap


def cause(error: BaseException) -> str:
    """The error's type and text on one line, at most 300 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=300, placeholder=" ...")
