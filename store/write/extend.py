"""Extend a store in place: more views, more samples of a grown data set, further layers.

Existing files are not rewritten, and readers see the previously finished part until the extension is finished too.
A second job also uses this to check whether a store already has what it wants, or belongs to something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import FingerprintMismatch, differences
from kdpipe.store.format.encodings.head import require_head, write_head
from kdpipe.store.format.encodings.logit_encoding import encoding_json
from kdpipe.store.format.identity import PLAIN
from kdpipe.store.format.manifest import Manifest, version_note
from kdpipe.store.format.samples import Samples, read_samples, sample_chunks
from kdpipe.store.format.zarr_metadata import read_store_manifest, replace_metadata
from kdpipe.store.fs.atomic_write import make_folders, sweep_partial, write_atomically
from kdpipe.store.write.acceptance import require_readable
from kdpipe.store.write.claims import exclusive_store
from kdpipe.store.write.writer import create_store, write_errors

ADVICE = "Use another store (--run or cache.store; in Python path=), or delete this one to cache again."

COUNTS = ("num_samples", "ids_and_labels_sha256", "pixels_sha256")
"""Keys of the data's identity that an extension changes."""


def ensure_store(
    path: Path,
    wanted: Manifest,
    samples: Samples,
    decide: Callable[[Manifest], Manifest] = lambda wanted: wanted,
    check: Callable[[], None] | None = None,
    *,
    head: NDArray[np.float32] | None = None,
) -> Manifest:
    """Create the store at `path`, or extend it, so that it has room for all that is `wanted` of `samples`.

    `decide` completes the manifest of a new store, which may take minutes, while other jobs that want it wait: each
    calls its `check` meanwhile, which may raise. `head` is the teacher's, if `wanted` has one. Returns the store's
    manifest, which may cover more. Raises FingerprintMismatch where the store has another teacher, other samples or
    another encoding.
    """
    with exclusive_store(path, check):
        if not path.exists():
            decided = decide(wanted)
            create_store(path, decided, samples, head)
            return decided
        stored = read_store_manifest(path)
        grown, added = plan_growth(path, stored, wanted, samples)
        if grown != stored:
            with write_errors(path):
                grow(path, stored, grown, added, head)
    return grown


def plan_growth(path: Path, stored: Manifest, wanted: Manifest, samples: Samples) -> tuple[Manifest, Samples]:
    """Return the manifest with room for all that is `wanted`, and the samples that the store lacks.

    Raises FingerprintMismatch where the store cannot be extended to that, StoreError where readers would refuse it.
    """
    wanted = as_older(wanted, stored)
    require_same_origin(path, stored, wanted)
    present = read_samples(path, stored.layout, stored.identity.data)
    new = _new_samples(path, present, samples)
    names = {spec.name for spec in stored.arrays}
    grown = replace(
        stored,
        arrays=(*stored.arrays, *[spec for spec in wanted.arrays if spec.name not in names]),
        layout=replace(stored.layout, num_views=max(stored.layout.num_views, wanted.layout.num_views)),
        head=stored.head or wanted.head,
    )
    if len(new.ids):
        grown = _with_segment(grown, present.followed_by(new))
    if grown != stored:
        require_readable(grown, f"the extended store {path}")
    return grown, new


def as_older(wanted: Manifest, stored: Manifest) -> Manifest:
    """Return `wanted` with an array of each part of its top-k logits, as an older store has them, if `stored` has."""
    top_k = wanted.top_k
    if top_k is None or stored.top_k != replace(top_k, dtype=None):
        return wanted
    others = [spec for spec in wanted.arrays if not spec.name.startswith("logits/")]
    return replace(wanted, encoding=stored.top_k, arrays=(*stored.top_k.arrays(wanted.logits_dtype), *others))


def require_same_origin(path: Path, stored: Manifest, wanted: Manifest) -> None:
    """Raise FingerprintMismatch unless teacher, kind of data, view recipe and encoding of both are equal."""
    stored_json, wanted_json = (_origin(manifest) for manifest in (stored, wanted))
    computed, asked = {**PLAIN, **stored.identity.compute}, wanted.identity.compute
    stored_json["compute"], wanted_json["compute"] = {key: computed.get(key) for key in asked}, dict(asked)
    found = [
        pair for section in wanted_json for pair in differences(stored_json[section], wanted_json[section], section)
    ]
    present = {spec.name: spec.to_json() for spec in stored.arrays}
    for spec in wanted.arrays:
        found += differences(present.get(spec.name, spec.to_json()), spec.to_json(), f"arrays.{spec.name}")
    if stored.head and wanted.head:
        found += differences(stored.head.to_json(), wanted.head.to_json(), "head")
    if found:
        advice = ADVICE + version_note(stored.versions, wanted.versions)
        if all(key.startswith("compute.") for key, *_ in found):
            keys = ", ".join(key.replace("compute", "cache") for key, *_ in found)
            advice = f"Leave {keys} out to continue it as it was begun. {ADVICE}"
        raise FingerprintMismatch(f"the store {path}", found, advice)


def _origin(manifest: Manifest) -> dict[str, object]:
    return {
        "teacher": manifest.identity.teacher,
        "data": {key: value for key, value in manifest.identity.data.items() if key not in COUNTS},
        "views": manifest.identity.views,
        "logits": "from the head" if manifest.logits_from_head else "stored" if manifest.has_logits else "none",
        **{"encoding": None, **encoding_json(manifest.encoding)},
        "codec": manifest.codec and manifest.codec.to_json(),
        "rounded": dict(manifest.rounded),
    }


def _new_samples(path: Path, present: Samples, samples: Samples) -> Samples:
    """Return those of `samples` whose ids the store lacks; those that it has must be equal."""
    positions = present.positions_of(samples.ids)
    known = positions >= 0
    if not known.all() and known.sum() < len(present.ids):  # neither a subset nor a grown data set
        pairs = differences(present.digests(), samples.digests(), "data")
        raise FingerprintMismatch(f"the store {path}", pairs, ADVICE)
    stored, wanted = present.take(positions[known]), samples.take(known)
    for column in ("labels", "pixels_crc32c"):
        old, new = getattr(stored, column), getattr(wanted, column)
        differ = np.flatnonzero(old != new)
        if len(differ):
            pairs = [(f"{column} of sample {int(wanted.ids[i])}", int(old[i]), int(new[i])) for i in differ[:3]]
            raise FingerprintMismatch(
                f"the store {path}", pairs, f"In all, {len(differ)} of {len(samples.ids)} samples differ. {ADVICE}"
            )
    return samples.take(~known)


def _with_segment(grown: Manifest, samples: Samples) -> Manifest:
    """Add a segment to `grown`, so that it covers all of `samples`."""
    layout = grown.layout
    added = len(samples.ids) - layout.num_samples
    data = {**grown.identity.data, **samples.digests(), "num_samples": len(samples.ids)}
    return replace(
        grown,
        identity=replace(grown.identity, data=data),
        layout=replace(layout, segments=(*layout.segments, added)),
        previous_fingerprints=grown.segment_fingerprints,
    )


def grow(
    path: Path, stored: Manifest, grown: Manifest, added: Samples, head: NDArray[np.float32] | None = None
) -> None:
    """Append samples, add the `head`, and make the manifest `grown`, written last: a reader sees the old or the new.

    The caller has the store's lock, or is its only writer.
    """
    if grown.head != stored.head:
        require_head(head, grown.head, f"the store {path}")
        if head is not None:
            write_head(path, head)
    if len(added.ids):
        present = read_samples(path, stored.layout, stored.identity.data)
        first_row = stored.layout.num_shards * stored.layout.unit_rows
        for key, raw in sample_chunks(present.followed_by(added), grown.layout, first_row):
            make_folders([(path / key).parent])
            sweep_partial(path / key)
            write_atomically(path / key, raw)
    replace_metadata(path, grown)
