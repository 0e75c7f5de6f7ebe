"""Extending a store in place: more views, more samples of a grown data set, another layer.

Nothing that is there is rewritten, and readers see what was finished before until the extension is finished too. It
is also how a second job finds out that a store already holds what it wants, or belongs to something else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from store.fs.atomic_write import make_folders, sweep_partial, write_atomically
from store.errors import FingerprintMismatch, differences
from store.format.layout import StoreLayout
from store.format.identity import Identity
from store.format.manifest import Manifest, version_note
from store.format.samples import Samples, read_samples, sample_chunks
from store.write.writer import exclusive_store, create_store, translate_os_errors
from store.format.zarr_metadata import read_store_manifest, replace_metadata

ADVICE = "Give this recipe another run folder or cache.store, or delete the store to cache again."

COUNTS = ("num_samples", "ids_and_labels_sha256", "pixels_sha256")
"""What an extension changes in the identity of the data."""


def ensure_store(path: Path, wanted: Manifest, samples: Samples) -> Manifest:
    """Make the store at `path`, or extend it, so that it has room for all that is `wanted` of `samples`.

    Returns its manifest, which may hold more. Raises FingerprintMismatch, pair by pair, where the store was made by
    another teacher, of other samples, or in another form; StoreError where the disk refuses.
    """
    with exclusive_store(path):
        if not path.exists():
            create_store(path, wanted, samples)
            return wanted
        stored = read_store_manifest(path)
        grown, added = plan_growth(path, stored, wanted, samples)
        if grown != stored:
            with translate_os_errors(path):
                _grow(path, stored, grown, added)
    return grown


def plan_growth(path: Path, stored: Manifest, wanted: Manifest, samples: Samples) -> tuple[Manifest, Samples]:
    """What the store must become to hold all that is `wanted`, and the samples that it lacks.

    Raises FingerprintMismatch where it cannot become that.
    """
    require_same_origin(path, stored, wanted)
    held = read_samples(path, stored.layout, stored.identity.data)
    new = _new_samples(path, held, samples)
    there = {spec.name for spec in stored.arrays}
    grown = replace(
        stored,
        arrays=(*stored.arrays, *[spec for spec in wanted.arrays if spec.name not in there]),
        layout=replace(stored.layout, num_views=max(stored.layout.num_views, wanted.layout.num_views)),
    )
    return (_with_segment(grown, held.followed_by(new)) if len(new.ids) else grown), new


def require_same_origin(path: Path, stored: Manifest, wanted: Manifest) -> None:
    """Raise FingerprintMismatch unless both speak of one teacher, one kind of data, one view recipe and one form."""
    found = []
    for mine, theirs, section in (
        (stored.identity.teacher, wanted.identity.teacher, "teacher"),
        (_without_counts(stored.identity), _without_counts(wanted.identity), "data"),
        (stored.identity.views, wanted.identity.views, "views"),
        (stored.top_k and stored.top_k.to_json(), wanted.top_k and wanted.top_k.to_json(), "top_k"),
        (stored.codec and stored.codec.to_json(), wanted.codec and wanted.codec.to_json(), "codec"),
        (dict(stored.rounded), dict(wanted.rounded), "rounded"),
    ):
        found += differences(mine, theirs, section)
    held = {spec.name: spec.to_json() for spec in stored.arrays}
    for spec in wanted.arrays:
        found += differences(held.get(spec.name, spec.to_json()), spec.to_json(), f"arrays.{spec.name}")
    if found:
        raise FingerprintMismatch(f"the store {path}", found, ADVICE + version_note(stored.versions, wanted.versions))


def _without_counts(identity: Identity) -> dict[str, object]:
    return {key: value for key, value in identity.data.items() if key not in COUNTS}


def _new_samples(path: Path, held: Samples, samples: Samples) -> Samples:
    """Those of `samples` whose ids the store lacks; those that it has must be the same ones."""
    at = held.positions_of(samples.ids)
    known = at >= 0
    if not known.all() and known.sum() < len(held.ids):  # neither a part of what is there, nor a grown data set
        pairs = differences(held.digests(), samples.digests(), "data")
        raise FingerprintMismatch(f"the store {path}", pairs, ADVICE)
    stored = held.take(at[known])
    wanted = samples.take(known)
    for what in ("labels", "pixels_crc32c"):
        mine, theirs = getattr(stored, what), getattr(wanted, what)
        differ = np.flatnonzero(mine != theirs)
        if len(differ):
            pairs = [
                (f"{what} of sample {int(wanted.ids[one])}", int(mine[one]), int(theirs[one])) for one in differ[:3]
            ]
            raise FingerprintMismatch(
                f"the store {path}", pairs, f"In all, {len(differ)} of {len(samples.ids)} samples differ. {ADVICE}"
            )
    return samples.take(~known)


def _with_segment(grown: Manifest, samples: Samples) -> Manifest:
    """`grown` with one more segment, so that it holds all of `samples`."""
    layout = grown.layout
    added = len(samples.ids) - layout.num_samples
    data = {**grown.identity.data, **samples.digests(), "num_samples": len(samples.ids)}
    return replace(
        grown,
        identity=replace(grown.identity, data=data),
        layout=replace(layout, segments=(*layout.segments, added)),
        previous_fingerprints=grown.segment_fingerprints,
    )


def _grow(path: Path, stored: Manifest, grown: Manifest, added: Samples) -> None:
    """Append the samples, then let the metadata say so, the manifest last: a reader sees the old store or the new."""
    if len(added.ids):
        held = read_samples(path, stored.layout, stored.identity.data)
        for key, raw in sample_chunks(held.followed_by(added), grown.layout, _first_new_row(stored.layout)):
            make_folders([(path / key).parent])
            sweep_partial(path / key)
            write_atomically(path / key, raw)
    replace_metadata(path, grown)


def _first_new_row(layout: StoreLayout) -> int:
    return layout.num_shards * layout.unit_rows
