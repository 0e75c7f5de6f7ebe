"""Open target stores for given views, staging those that cannot be memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.errors import ANOTHER_RUN
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.runtime.versions import library_versions
from kdpipe.store import (
    TargetStore,
    default_staging_cache,
    is_url,
    open_store,
    read_store_manifest,
    stage,
    version_note,
)
from kdpipe.store.fs import safe_read


def open_with_views(path: Path, views: Mapping[str, Any], identity: Mapping[str, Any]) -> TargetStore:
    """Open a store whose manifest must contain the identity of the views, and `identity`.

    Raises:
        FingerprintMismatch: The store was made from other views, or differs from `identity`.
        StoreError: The store cannot be opened.
    """
    advice = f"Choose {ANOTHER_RUN} or another store, or return to the recipe that made this one."
    manifest = read_store_manifest(path)
    stored, wanted = kinds_of(manifest.identity.views), kinds_of(views)
    if stored != wanted:
        advice = f"The store has {stored}, the recipe {wanted} (views.kinds). {advice}"
    advice += version_note(manifest.versions, library_versions())
    return open_store(path, {**identity, "views": dict(views)}, advice)


def kinds_of(views: Mapping[str, Any]) -> str:
    """Return the kinds of views of a store's identity in words."""
    kinds = views.get("kinds")
    if not isinstance(kinds, list):
        return "views of one kind"
    return f"views of the kinds {', '.join(str(kind.get('name')) for kind in kinds if isinstance(kind, dict))}"


def open_store_anywhere(
    place: str | Path, monitor: RunMonitor | None = None, *, follow_links: bool = False
) -> TargetStore:
    """Open the store at a path or URL.

    A local store is memory-mapped; one at a URL, or an archive, is first copied to this machine's cache (KDPIPE_CACHE),
    once for all jobs. A training streams what is too large to be mapped. Links that lead out of a local store, as DVC
    and the Hugging Face cache make them, are refused unless you ask to follow them (`follow_links`).

    Example:
        >>> import kdpipe as kd
        >>> train, test = kd.load_dataset("digits", test_share=0.5)
        >>> teacher, views = kd.create_model("cnn", train), kd.Views(2, ["RandomCrop"])
        >>> _ = kd.cache_teacher(teacher, train, "opened.zarr", views=views, mean=[0.3], std=[0.4], progress=False)
        >>> store = kd.open_store("opened.zarr")
        >>> store.gather("logits", view=1, sample_ids=train.sample_ids[:3].numpy()).shape
        (3, 10)

    Raises:
        StoreError: There is no store, or it is incomplete or damaged.
    """
    found = place if is_url(place) else Path(place).expanduser()
    if follow_links:
        trust_links([found])
    return open_store(local_store_path(found, monitor or RunMonitor()))


def trust_links(places: Iterable[str | Path]) -> None:
    """Follow links that lead out of these stores, and out of their test and validation stores, in this process."""
    for place in places:
        for one in (place, test_store_path(place), part_store_path(place, VALIDATION)):
            if not is_url(one):
                safe_read.follow_links(Path(one))


def local_store_path(place: Path | str, monitor: RunMonitor) -> Path:
    """Return a local path of a store that can be memory-mapped, staging it first if necessary."""

    def on_unit(done: int, total: int) -> None:
        monitor.report(ProgressEvent("stage", f"{place} to {area.folder}", done, total, "unit"))
        monitor.check()  # archives on this machine, too; what is staged is kept

    area = default_staging_cache(os.environ)
    return stage(place, area, on_unit, monitor.check)


def test_store_path(place: Path | str) -> Path | str:
    """Return the path of the test store: `store.test.zarr` beside `store.zarr`."""
    return part_store_path(place, "test")


def stores_beside(store: Path) -> list[Path]:
    """Return a local store, and the paths of those of the test and validation images beside it."""
    return [store, *(Path(part_store_path(store, part)) for part in ("test", VALIDATION))]


def part_store_path(place: Path | str, part: Part) -> Path | str:
    """Return the path of the store with the logits of the test or validation images, beside a training store."""
    folder, slash, name = str(place).rstrip("/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    beside = f"{folder}{slash}{stem}.{part}.{suffix}" if dot and stem else f"{folder}{slash}{name}.{part}"
    return beside if is_url(place) else Path(beside)
