"""What a store may be turned into without its teacher, and what the new one then says of itself."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import Literal

from store.format.codec import Codec
from store.errors import StoreError
from store.format.layout import PAGE_BYTES, ArraySpec, StoreLayout
from store.format.identity import Identity
from store.format.manifest import Manifest
from store.read.target_store import TargetStore
from store.format.topk import TAIL, VALUES, TopK, default_temperatures

MANTISSA_BITS = {"float16": 10, "float32": 23}

MAX_REGROUPED_BYTES = 2**28
"""Units are made longer, for narrower rows to fill whole pages, while the widest array's shard stays within this."""


@dataclass(frozen=True)
class TranscodeOptions:
    """What is to become of a store; the default is a checked copy.

    top_k: keep the k largest logits of dense ones, and the rest's mass over `temperatures` (default_temperatures()).
    dtype: "float16" narrows float32 arrays.
    num_views: keep the first so many.
    arrays: keep these, by name; logits always stay.
    codec: pack chunks with a Codec (the archive profile), or unpack them ("zero-copy"), or leave that as it is.
    keep_bits: round the mantissas of float arrays to so many bits, nearest, ties to even (BitRound: Klöwer et al.
        2021), so that they pack better. An array that has no more is left as it is, and so is a top-k tail.
    """

    top_k: int | None = None
    temperatures: tuple[float, ...] | None = None
    dtype: str | None = None
    num_views: int | None = None
    arrays: tuple[str, ...] | None = None
    codec: Codec | Literal["zero-copy", "as it is"] = "as it is"
    keep_bits: int | None = None


def transcoded_manifest(source: TargetStore, change: TranscodeOptions) -> Manifest:
    """What a new store says of itself that `change` makes of `source`: all that decides its bytes.

    Units keep their rows, unless the rows of a new array would not fill whole pages (and so could not be mapped): they
    are then made several times as long. Raises StoreError where the change is impossible.
    """
    manifest, finished = source.manifest, source.manifest.finished
    num_segments = finished.num_segments if finished else len(manifest.layout.segments)
    form = _form(source, change)
    specs = _specs(source, change, form)
    return replace(
        manifest,
        identity=_identity(source, num_segments),
        arrays=specs,
        layout=StoreLayout(
            _num_views(source, change), _unit_rows(source, specs), manifest.layout.segments[:num_segments]
        ),
        previous_fingerprints=manifest.segment_fingerprints[: num_segments - 1],
        top_k=form,
        codec=_codec(manifest, change),
        rounded=_rounded(source, specs, change.keep_bits),
        finished=None,
    )


def _identity(source: TargetStore, num_segments: int) -> Identity:
    """Whose outputs the first segments are: of a store that is being extended, as it was before."""
    manifest = source.manifest
    fingerprint = manifest.segment_fingerprints[num_segments - 1]
    data = {**manifest.identity.data, **source.samples.digests(), "num_samples": source.num_samples}
    for identity in (manifest.identity, replace(manifest.identity, data=data)):
        if identity.fingerprint == fingerprint:
            return identity
    raise StoreError(
        f"{source.path} is being extended: run `kdpipe cache-teacher` to finish that, and then this again."
    )


def _num_views(source: TargetStore, change: TranscodeOptions) -> int:
    num_views = source.num_views if change.num_views is None else change.num_views
    if not 1 <= num_views <= source.num_views:
        raise StoreError(f"{source.path} has {source.num_views} views: {num_views} of them cannot be kept.")
    return num_views


def _codec(manifest: Manifest, change: TranscodeOptions) -> Codec | None:
    if isinstance(change.codec, Codec):
        return change.codec
    return {"zero-copy": None, "as it is": manifest.codec}[change.codec]


def _form(source: TargetStore, change: TranscodeOptions) -> TopK | None:
    held = source.manifest.top_k
    if change.top_k is None:
        if change.temperatures is not None:
            raise StoreError("temperatures belong to top-k logits: give top_k too, or leave temperatures out.")
        return held
    if held is not None:
        raise StoreError(
            f"{source.path} holds the {held.k} largest logits only, and no top {change.top_k} can be made of these: "
            "transcode a store of dense logits."
        )
    try:
        return TopK(source.num_classes, change.top_k, change.temperatures or default_temperatures())
    except (TypeError, ValueError) as error:
        raise StoreError(f"top-k logits cannot be made of {source.path}: {error}.") from error


def _specs(source: TargetStore, change: TranscodeOptions, form: TopK | None) -> tuple[ArraySpec, ...]:
    kept = [spec for spec in source.arrays if logical_array(spec.name) in _kept_names(source, change)]
    if change.dtype not in {None, *MANTISSA_BITS}:
        raise StoreError(f"arrays cannot be narrowed to {change.dtype!r}: float16 is known.")
    wider = [spec.name for spec in kept if change.dtype == "float32" and spec.name != TAIL and spec.dtype == "float16"]
    if wider:
        raise StoreError(
            f"{wider[0]} of {source.path} is float16, and as float32 it would only pretend to be more precise: leave "
            "dtype out, or cache again as float32."
        )
    specs = [spec if spec.dtype != "float32" else replace(spec, dtype=change.dtype or spec.dtype) for spec in kept]
    if form is None or source.manifest.top_k is not None:
        return tuple(specs)
    logits = next(spec for spec in specs if spec.name == "logits")
    if len(logits.row_shape) != 1:
        raise StoreError(f"{source.path} has logits of shape {list(logits.row_shape)}: top-k needs one row of classes.")
    return (*form.arrays(logits.dtype), *[spec for spec in specs if spec is not logits])


def _kept_names(source: TargetStore, change: TranscodeOptions) -> set[str]:
    held = list(dict.fromkeys(logical_array(spec.name) for spec in source.arrays))
    for name in change.arrays or ():
        if name not in held:
            near = difflib.get_close_matches(name, held, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise StoreError(f"{source.path} holds no array {name!r}, only {', '.join(held)}.{hint}")
    return set(held) if change.arrays is None else {"logits", *change.arrays}


def logical_array(name: str) -> str:
    """What an array is part of: top-k logits are three arrays."""
    return "logits" if name.startswith("logits/") else name


def _unit_rows(source: TargetStore, specs: tuple[ArraySpec, ...]) -> int:
    new = [spec for spec in specs if spec not in source.arrays]
    aligned = math.lcm(source.unit_rows, *(PAGE_BYTES // math.gcd(spec.row_bytes, PAGE_BYTES) for spec in new))
    widest = max(spec.row_bytes for spec in (*source.arrays, *specs))
    return aligned if aligned * widest <= MAX_REGROUPED_BYTES else source.unit_rows


def _rounded(source: TargetStore, specs: tuple[ArraySpec, ...], keep_bits: int | None) -> dict[str, int]:
    """Mantissa bits kept, by array. What was once rounded stays called so: its numbers are not the teacher's."""
    before = dict(source.manifest.rounded)
    if "logits" in before:
        before[VALUES] = before["logits"]
    most = {spec.name: MANTISSA_BITS[spec.dtype] for spec in specs if spec.dtype in MANTISSA_BITS and spec.name != TAIL}
    if keep_bits is not None and not 1 <= keep_bits < max(most.values()):
        raise StoreError(
            f"keep_bits is {keep_bits}, and the widest array of {source.path} has {max(most.values())} bits in its "
            f"mantissa: choose from 1 to {max(most.values()) - 1}."
        )
    kept = {name: before.get(name, bits) for name, bits in most.items()}
    kept = {name: min(bits, most[name], keep_bits or bits) for name, bits in kept.items()}
    return {name: bits for name, bits in kept.items() if name in before or bits < most[name]}
