"""Rebuild the `views` section from what a store records."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kdpipe.stages.faults import fault_sentence
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig
from kdpipe.store import StoreError, TargetStore


def views_of_store(store: TargetStore) -> Views:
    """Return the views that a store's targets were computed on.

    `open_with_views` still compares their identities, pixels of probe views included: a record of another version of
    kdpipe or torchvision is not taken for these.

    Raises:
        StoreError: The record is not one of views.
    """
    stored = store.manifest.identity.views
    views: dict[str, Any] = {key: stored[key] for key in ("engine", "operations", "seed", "transform") if key in stored}
    num_views = store.num_views
    if isinstance(kinds := stored.get("kinds"), list):
        named = [kind if isinstance(kind, dict) else {} for kind in kinds]
        views["kinds"] = {str(kind.get("name")): kind.get("operations") for kind in named}
        num_views //= max(1, len(kinds))
    if isinstance(stored.get("mix"), dict):
        views["mix"] = {field.name: stored["mix"].get(field.name) for field in fields(MixConfig)}
    try:
        rebuilt: Views = TypeAdapter(Views).validate_json(json.dumps({**views, "num_views": num_views}))
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(
            f"{store.path} records views that this version of kdpipe cannot rebuild "
            f"({'.'.join(map(str, first['loc']))}: {fault_sentence(first)}): cache again."
        ) from error
    return rebuilt
