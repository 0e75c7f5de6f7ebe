"""The manifest of a store: identity, arrays, layout, encodings, and the part that is finished."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdpipe.store.errors import FingerprintMismatch, StoreError, differences
from kdpipe.store.format.codec import Codec, codec_from_json
from kdpipe.store.format.encodings.head import HeadRecord
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding, encoding_json, parse_encoding
from kdpipe.store.format.encodings.quantized_maps import RANGE, unpaired
from kdpipe.store.format.encodings.topk import VALUES, TopK
from kdpipe.store.format.identity import PLAIN, Identity, sha256_of
from kdpipe.store.format.layout import DTYPES, ArraySpec, StoreLayout
from kdpipe.store.format.samples import Samples
from kdpipe.store.format.schema import ATTRIBUTE, MAX_COUNT, MAX_SHARD_BYTES, MAX_UNITS, SCHEMA_VERSION

EMBEDDINGS = "features/pre_logits"
"""The array of a teacher's embeddings: the input of its classifier, or what a teacher without one returns."""

STATISTICS = ("features", "pooled", "mean_std", "attention", "gram", "spatial_gram", "input_gradient")
"""Groups of a layer's arrays: its feature map, or a statistic of it; with `-HxW` where it was pooled first."""

ARRAY_NAME = re.compile(
    rf"logits|logits/(values|indices|tail|packed)"
    rf"|({'|'.join([*STATISTICS, RANGE])})(-[1-9][0-9]{{0,4}}x[1-9][0-9]{{0,4}})?/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,199}}"
)
"""Valid array names: they become paths, and must not leave the store."""


@dataclass(frozen=True)
class Finished:
    """The part of a store that readers see; a store that is being extended keeps what was finished before.

    Every unit of the first `num_views` views and `num_segments` segments is committed for `arrays`.

    Attributes:
        fidelity: By array, the error of its encoding, measured when it was written.
    """

    num_views: int
    num_segments: int
    arrays: tuple[str, ...]
    fidelity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_views": self.num_views,
            "num_segments": self.num_segments,
            "arrays": list(self.arrays),
            "fidelity": dict(self.fidelity),
        }


@dataclass(frozen=True)
class Manifest:
    """Contents of a store's group attributes.

    Attributes:
        previous_fingerprints: Fingerprints before each extension by samples, one for each segment but the last: the
            markers of a segment's units carry that of their segment.
        encoding: Of the logits; None where there is an array of all of them.
        codec: Set where chunks are compressed (the archive profile).
        rounded: Mantissa bits kept, of arrays that were rounded.
        named_axes: Whether every axis of the arrays has a name of its own, as xarray needs it; not in older stores.
        trial: What was found before the teacher ran: device, batch size, and the error of its precision; empty where
            there was no trial.
        head: The teacher's last linear layer, where it is stored. In a store without logits they follow from it and the
            embeddings.
    """

    identity: Identity
    arrays: tuple[ArraySpec, ...]
    layout: StoreLayout
    versions: Mapping[str, str]
    previous_fingerprints: tuple[str, ...] = ()
    encoding: LogitEncoding | None = None
    codec: Codec | None = None
    rounded: Mapping[str, int] = field(default_factory=dict)
    finished: Finished | None = None
    named_axes: bool = False
    trial: Mapping[str, Any] = field(default_factory=dict)
    head: HeadRecord | None = None

    @property
    def profile(self) -> str:
        return "archive" if self.codec else "zero-copy"

    @property
    def has_logits(self) -> bool:
        """Whether there are logits, of all classes or the largest, or a head; else the teacher has no classifier."""
        return self.head is not None or any(spec.name.startswith("logits") for spec in self.arrays)

    @property
    def logits_from_head(self) -> bool:
        """Whether logits are not stored, but follow from embeddings and head."""
        return self.head is not None and not any(spec.name.startswith("logits") for spec in self.arrays)

    @property
    def top_k(self) -> TopK | None:
        """The encoding of the logits if their k largest are stored."""
        return self.encoding if isinstance(self.encoding, TopK) else None

    @property
    def logits_dtype(self) -> str:
        """The type of the logits, or of those that are kept; of quantized ones that of their range."""
        names = {spec.name: spec.dtype for spec in self.arrays}
        return names.get("logits") or (self.top_k and self.top_k.dtype) or names.get(VALUES, "float16")

    @property
    def task(self) -> str:
        """What the outputs are: scores of classes, of independent labels, or numbers."""
        return str(self.identity.data.get("task", "classification"))

    @property
    def segment_fingerprints(self) -> tuple[str, ...]:
        """Fingerprint in the markers of each segment's units."""
        return (*self.previous_fingerprints, self.identity.fingerprint)

    def identity_of(self, num_segments: int, samples: Samples, where: str) -> Identity:
        """Return the identity that the store had with so many segments, which hold `samples`.

        Raises StoreError unless that segment's fingerprint matches.
        """
        identity = self.identity
        if num_segments < len(self.layout.segments):
            data = {**identity.data, **samples.digests(), "num_samples": len(samples.ids)}
            identity = replace(identity, data=data)
        if identity.fingerprint != self.segment_fingerprints[num_segments - 1]:
            raise StoreError(
                f"{where} has a damaged manifest: the fingerprint of segment {num_segments - 1} is not that of its "
                "samples. Cache it again."
            )
        return identity

    def to_json(self) -> dict[str, Any]:
        """Return the attributes; `sha256` covers all of them, `fingerprint` only what decides the numbers."""
        record = self._record()
        return {**record, "sha256": sha256_of(record)}

    def _record(self) -> dict[str, Any]:
        segments = [
            {"num_samples": count, "fingerprint": fingerprint}
            for count, fingerprint in zip(self.layout.segments, self.segment_fingerprints, strict=True)
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.identity.fingerprint,
            **self.identity.to_json(),
            "arrays": {spec.name: spec.to_json() for spec in self.arrays},
            "num_views": self.layout.num_views,
            "unit_rows": self.layout.unit_rows,
            "segments": segments,
            **encoding_json(self.encoding),
            "codec": self.codec.to_json() if self.codec else None,
            "rounded": dict(self.rounded),
            "versions": dict(self.versions),
            "finished": self.finished.to_json() if self.finished else None,
            **({"named_axes": True} if self.named_axes else {}),
            **({"trial": dict(self.trial)} if self.trial else {}),
            **({"head": self.head.to_json()} if self.head else {}),
        }

    def spec(self, name: str) -> ArraySpec:
        """Return the array `name`. Raises StoreError, listing the arrays that exist, if there is none."""
        for spec in self.arrays:
            if spec.name == name:
                return spec
        names = ", ".join(spec.name for spec in self.arrays)
        raise StoreError(
            f"the store has no array {name!r}, only {names}: run `kdpipe cache-teacher` with a recipe that needs it "
            "to add it."
        )

    def numbers_sha256(self, names: Sequence[str]) -> str:
        """Return a digest of what decides the numbers of some arrays, whatever else the store holds.

        Part of a student's identity: a store that has grown gives the same targets; one that was rounded or cut to
        its top k does not.
        """
        record = {
            "teacher": dict(self.identity.teacher),
            "views": dict(self.identity.views),
            "arrays": {name: self.spec(name).to_json() for name in sorted(names)},
            "rounded": {name: bits for name, bits in self.rounded.items() if name in names},
            **({"compute": dict(self.identity.compute)} if self.identity.compute else {}),
        }
        if self.encoding and any(name.startswith("logits/") for name in names):  # not all of it is in the shapes
            record |= {name: value for name, value in encoding_json(self.encoding).items() if value}
        return sha256_of(record)


def read_manifest(attributes: Any, where: str) -> Manifest:
    """Parse a store's group attributes. Raises StoreError where they are not a manifest of this schema."""
    record = attributes.get(ATTRIBUTE) if isinstance(attributes, Mapping) else None
    if not isinstance(record, Mapping):
        raise StoreError(f"{where} is a Zarr group, but not a kdpipe target store: it has no {ATTRIBUTE!r} attribute.")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{where} has store schema {str(version)[:40]}, this kdpipe reads {SCHEMA_VERSION}: use the kdpipe that "
            "wrote it, or cache again."
        )
    try:
        manifest = _parse(record)
        edited = record != manifest.to_json()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} has a damaged manifest ({type(error).__name__}: {str(error)[:200]}).") from error
    if edited:
        raise StoreError(
            f"{where} has a manifest that was edited or damaged: its checksum does not match. Run `kdpipe store repair "
            "RECIPE`."
        )
    return manifest


def _parse(record: Mapping[str, Any]) -> Manifest:
    arrays = tuple(_parse_spec(name, spec) for name, spec in record["arrays"].items())
    if not arrays:
        raise ValueError("it lists no arrays")
    manifest = Manifest(
        identity=Identity(
            dict(record["teacher"]), dict(record["data"]), dict(record["views"]), dict(record.get("compute", {}))
        ),
        arrays=arrays,
        layout=_parse_layout(record, max(spec.row_bytes for spec in arrays)),
        versions={str(name): str(version) for name, version in record["versions"].items()},
        previous_fingerprints=tuple(str(segment["fingerprint"]) for segment in record["segments"][:-1]),
        encoding=parse_encoding(record),
        codec=codec_from_json(record["codec"]),
        rounded={str(name): _count(bits, "rounded") for name, bits in record["rounded"].items()},
        named_axes=record.get("named_axes") is True,
        trial=_parse_trial(record.get("trial", {})),
        head=HeadRecord.from_json(record["head"]) if "head" in record else None,
    )
    _check_logits(manifest)
    if name := unpaired(arrays):
        raise ValueError(f"{name} is not the codes or the ranges of feature maps that it lists")
    if not manifest.identity.compute.keys() <= PLAIN.keys():
        raise ValueError(f"compute has {list(manifest.identity.compute)}, not {list(PLAIN)}")
    classes = manifest.identity.data.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"the classes are {str(classes)[:40]}, not a list of names")
    return manifest if record["finished"] is None else replace(manifest, finished=_parse_finished(manifest, record))


def _parse_layout(record: Mapping[str, Any], row_bytes: int) -> StoreLayout:
    layout = StoreLayout(
        _count(record["num_views"], "num_views"),
        _count(record["unit_rows"], "unit_rows"),
        tuple(_count(segment["num_samples"], "num_samples") for segment in record["segments"]),
    )
    if not 0 < len(layout.segments) <= MAX_UNITS:
        raise ValueError(f"it has {len(layout.segments)} segments")
    if layout.num_views * layout.num_shards > MAX_UNITS:
        raise ValueError(f"{layout.num_views} views of {layout.num_shards} shards are too many")
    if layout.unit_rows * row_bytes > MAX_SHARD_BYTES:
        raise ValueError(f"unit_rows is {layout.unit_rows}, too many for its arrays")
    return layout


def _parse_spec(name: Any, record: Any) -> ArraySpec:
    sides = record["row_shape"]
    if not ARRAY_NAME.fullmatch(name) or record["dtype"] not in DTYPES or not _is_shape(sides):
        raise ValueError(f"array {str(name)[:80]!r} is {str(record)[:120]}")
    return ArraySpec(name, tuple(sides), record["dtype"], record.get("own_output") is True)


def _parse_trial(record: Mapping[str, Any]) -> dict[str, Any]:
    if not all(isinstance(record.get(name, {}), Mapping) for name in ("kl", "features", "dropped")):
        raise TypeError(f"the trial is {str(record)[:120]}")
    return dict(record)


def _check_logits(manifest: Manifest) -> None:
    logits = [spec for spec in manifest.arrays if spec.name.startswith("logits")]
    embeddings = [spec for spec in manifest.arrays if spec.name == EMBEDDINGS]
    if not logits and manifest.encoding is None and embeddings:
        if manifest.head is not None and embeddings[0].row_shape != (manifest.head.shape[1] - 1,):
            raise ValueError(f"its head of {manifest.head.shape[1] - 1} features is not that of its embeddings")
        return
    encoding = manifest.encoding
    if encoding is None and [spec.name for spec in logits] != ["logits"]:
        raise ValueError("it has no array of logits")
    if encoding is not None and (not logits or logits != list(encoding.arrays(logits[0].dtype))):
        raise ValueError(f"its arrays are not those of its {encoding.name} logits")


def _parse_finished(manifest: Manifest, manifest_record: Mapping[str, Any]) -> Finished:
    record = manifest_record["finished"]
    finished = Finished(
        _count(record["num_views"], "finished.num_views"),
        _count(record["num_segments"], "finished.num_segments"),
        tuple(str(name) for name in record["arrays"]),
        dict(record["fidelity"]),
    )
    fits = (
        finished.num_views <= manifest.layout.num_views
        and finished.num_segments <= len(manifest.layout.segments)
        and finished.arrays
        and set(finished.arrays) <= {spec.name for spec in manifest.arrays}
    )
    if not fits:
        raise ValueError("more is called finished than there is")
    return finished


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 < value < MAX_COUNT:
        raise ValueError(f"{what} is {str(value)[:40]}")
    return value


def _is_shape(sides: Any) -> bool:
    counts = isinstance(sides, list) and all(type(side) is int and 0 < side < MAX_COUNT for side in sides)
    return counts and 0 < len(sides) <= 8 and math.prod(sides) < MAX_COUNT


def version_note(stored: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return a sentence on the library versions that differ between a store and this process, or an empty string."""
    names = [name for name in sorted({*stored, *here}) if stored.get(name) != here.get(name)]
    differing = [f"{name} {stored.get(name, 'unknown')} (here {here.get(name, 'none')})" for name in names]
    return f" It was made with {', '.join(differing)}." if differing else ""


def require(stored: Manifest, wanted: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise FingerprintMismatch, pair by pair, unless `stored` has every value in `wanted`.

    `wanted` is a part of `Manifest.to_json()`: sections that it omits are not compared.
    """
    record = stored.to_json()
    found = [pair for section in sorted(wanted) for pair in differences(record.get(section), wanted[section], section)]
    if found:
        raise FingerprintMismatch(where, found, advice)
