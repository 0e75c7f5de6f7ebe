"""Leave user names, passwords and queries of URLs out of texts. Imports nothing heavy.

What kdpipe prints, logs and writes passes here: errors when they are made (`KdpipeError`), progress events, recipes as
JSON, JSON documents and lines on a terminal. The whole address is only in the user's recipe, and in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)
"""Keys that sound like secrets."""

HIDDEN = "..."
"""What stands for a secret."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://|(?:s3|gs|az|https?):/)((?:[^/@\n]{1,300}@)?[^\s\"'<>`]*)")
"""A URL in a text, or what `Path` makes of it; its password may have spaces and quotes, though it is then not valid."""

_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]{0,5})?[,;:)\]}]*")


def redacted(text: str) -> str:
    """Return a text without the user names, passwords and queries of its URLs, which may be cut off or invalid.

    Example:
        >>> redacted("cannot read s3://key:word@bucket/x?X-Amz-Signature=1: 403")
        'cannot read s3://...@bucket/x?...: 403'
    """
    return _URL.sub(_public, text) if ":/" in text else text


def redacted_json(value: Any) -> Any:
    """Return a JSON value with all of its texts redacted; keys of objects too."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(key) if isinstance(key, str) else key: redacted_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted_json, value))
    return value


def redacted_options(value: Any) -> Any:
    """Return a JSON value redacted, with the texts hidden whose keys sound like secrets, such as `api_key`.

    A text `KEY=VALUE` is such a key and its text, too.
    """
    if isinstance(value, Mapping):
        items = {str(key): redacted_options(inner) for key, inner in value.items()}
        return {key: HIDDEN if SECRET.search(key) and isinstance(inner, str) else inner for key, inner in items.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted_options, value))
    key, equals, _ = value.partition("=") if isinstance(value, str) else ("", "", "")
    return f"{key}={HIDDEN}" if equals and SECRET.search(key) else redacted_json(value)


def is_redacted(url: str) -> bool:
    """Return whether something was left out of a URL."""
    return f"://{HIDDEN}@" in url or url.endswith(f"?{HIDDEN}")


def _public(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        login = authority.rpartition("@")[0] + "@"
    elif _PORT.fullmatch(authority):
        login = ""
    else:  # a password with / or ?, or what is left of one that was cut
        login = rest.rpartition("@")[0] + "@" if "@" in rest else rest
    rest, question, query = rest[len(login) :].partition("?")
    after = query[len(query.rstrip(",;:)]}")) :]  # of the sentence
    return f"{scheme}{f'{HIDDEN}@' if login else ''}{rest}{question}{HIDDEN + after if query else ''}"
