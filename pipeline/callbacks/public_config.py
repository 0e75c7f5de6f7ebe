"""Turn a recipe into the configuration of an experiment tracker's run: flat, without secrets or paths of this host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe.store.redact import SECRET, redacted


def public_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a resolved recipe by dotted key, as numbers, texts and booleans.

    Absolute paths become the name of the file or folder; URLs lose user names, passwords and query; `callbacks`, and
    keys that sound like secrets, are left out.
    """
    return dict(_leaves({key: value for key, value in recipe.items() if key != "callbacks"}, ""))


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not SECRET.search(str(name)):
                yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(one, Mapping) for one in value):
        yield from _leaves({str(number): inner for number, inner in enumerate(value)}, key)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield key, json.dumps([_public(one) for one in value], default=str)
    else:
        yield key, _public(value)


def _public(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    if "://" in text:
        return redacted(text)
    kind, colon, path = text.partition(":") if re.match(r"[a-z]+:[/~]", text) else ("", "", text)
    return f"{kind}{colon}{Path(path).name}" if path.startswith(("/", "~")) else text
