"""Options of transcoding, and the manifest of the resulting store."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from kdpipe.store.errors import StoreError, did_you_mean
from kdpipe.store.format.codec import Codec
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import BITS, PACKED, Quantized
from kdpipe.store.format.encodings.quantized_maps import is_quantized, logical_map, quantized_specs
from kdpipe.store.format.encodings.sampled import Sampled
from kdpipe.store.format.encodings.topk import TAIL, VALUES, TopK, default_temperatures
from kdpipe.store.format.layout import PAGE_BYTES, ArraySpec, StoreLayout
from kdpipe.store.format.manifest import EMBEDDINGS, Manifest
from kdpipe.store.read.target_store import TargetStore

DENSE, HEAD = "dense", "head"

ASKED = {"top_k": "top-k", "sampled_labels": "sampled"}
"""Names of encodings by the option that asks for them."""

MANTISSA_BITS = {"float16": 10, "float32": 23}

MAX_REGROUPED_BYTES = 2**28
"""Units are lengthened, so that narrower rows fill whole pages, while the widest array's shard stays below this."""


@dataclass(frozen=True)
class TranscodeOptions:
    """Changes to a store; the default is a checked copy.

    Attributes:
        encoding: Encode logits as "int8" or "int4", or decode these, or those of a head, to "dense" ones.
        top_k: Keep the k largest logits, and the mass of the rest over `temperatures`.
        temperatures: Grid of the top-k tail; default_temperatures() if None.
        sampled_labels: Keep so many classes, drawn by the seed of the views.
        dtype: "float16" narrows float32 arrays.
        feature_dtype: "int8" quantizes feature maps with a range for each row and channel, "float16" decodes these.
        num_views: Keep only the first so many.
        arrays: Keep only these, by name, and the logits.
        codec: Compress chunks (the archive profile), or decompress them ("zero-copy"), or leave them as they are
            ("keep").
        keep_bits: Round the mantissas of float arrays to so many bits, to nearest, ties to even (BitRound, Klöwer et
            al. 2021), so that they compress better. Arrays with fewer bits and the top-k tail are left as they are.
    """

    encoding: str | None = None
    top_k: int | None = None
    temperatures: tuple[float, ...] | None = None
    sampled_labels: int | None = None
    dtype: str | None = None
    feature_dtype: str | None = None
    num_views: int | None = None
    arrays: tuple[str, ...] | None = None
    codec: Codec | Literal["zero-copy", "keep"] = "keep"
    keep_bits: int | None = None


def transcoded_manifest(source: TargetStore, options: TranscodeOptions) -> Manifest:
    """Return the manifest of the store that `options` make of `source`: it decides all of its bytes.

    Units keep their rows, unless the rows of a new array would not fill whole pages (and so could not be mapped): they
    are then made several times as long. Raises StoreError where the options do not apply to this store.
    """
    manifest, finished = source.manifest, source.manifest.finished
    num_segments = finished.num_segments if finished else len(manifest.layout.segments)
    num_views = source.num_views if options.num_views is None else options.num_views
    if not 1 <= num_views <= source.num_views:
        raise StoreError(f"{source.path} has {source.num_views} views, so {num_views} of them cannot be kept.")
    encoding = _encoding(source, options)
    specs = _specs(source, options, encoding)
    return replace(
        manifest,
        identity=manifest.identity_of(num_segments, source.samples, str(source.path)),
        arrays=specs,
        layout=StoreLayout(num_views, _unit_rows(source, specs), manifest.layout.segments[:num_segments]),
        previous_fingerprints=manifest.segment_fingerprints[: num_segments - 1],
        encoding=encoding,
        codec=options.codec
        if isinstance(options.codec, Codec)
        else {"zero-copy": None, "keep": manifest.codec}[options.codec],
        rounded=_rounded(source, specs, encoding, options.keep_bits),
        finished=None,
    )


def _encoding(source: TargetStore, options: TranscodeOptions) -> LogitEncoding | None:
    stored = source.manifest.encoding
    asked = [name for name in ("encoding", "top_k", "sampled_labels") if getattr(options, name) is not None]
    if options.dtype not in {None, *MANTISSA_BITS}:
        raise StoreError(f"arrays cannot be converted to {options.dtype!r}, only to float16.")
    if options.temperatures is not None and options.top_k is None:
        raise StoreError("temperatures apply to top-k logits only: set top_k too, or omit temperatures.")
    if not asked:
        return replace(stored, dtype=_logits_dtype(source, options)) if isinstance(stored, TopK) else stored
    if len(asked) > 1:
        raise StoreError(f"{asked[0]} and {asked[1]} each say how logits are stored: choose one.")
    if options.encoding == HEAD:
        if source.manifest.head is None or all(spec.name != EMBEDDINGS for spec in source.arrays):
            raise StoreError(
                f"{source.path} has logits, of which the vectors before the teacher's last layer cannot be made: cache "
                "with cache.encoding = 'head' into another store."
            )
        return None
    if options.encoding not in {None, DENSE, *BITS}:
        raise StoreError(f"logits cannot be stored as {options.encoding!r}; choose from {', '.join(BITS)}, {DENSE}.")
    if not source.manifest.has_logits:
        raise StoreError(f"{source.path} has embeddings, no logits: leave out {asked[0]}.")
    wanted = "dense" if options.encoding == DENSE else options.encoding or ASKED[asked[0]]
    if stored is not None and not stored.all_logits:
        raise StoreError(
            f"{source.path} has {stored.describe()}, of which no {wanted} logits can be made: transcode a "
            "store of dense logits."
        )
    if source.manifest.task != "classification" and (wanted != DENSE or stored is not None):
        raise StoreError(f"{wanted} logits are those of classes, and {source.path} has other outputs: omit {asked[0]}.")
    try:
        return _new_encoding(source, options)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{wanted} logits cannot be made of {source.path}: {error}.") from error


def _new_encoding(source: TargetStore, options: TranscodeOptions) -> LogitEncoding | None:
    if options.top_k is not None:
        grid = options.temperatures or default_temperatures()
        return TopK(source.num_classes, options.top_k, grid, _logits_dtype(source, options))
    if options.sampled_labels is not None:
        seed = int(source.manifest.identity.views.get("seed", 0))
        return Sampled(source.num_classes, options.sampled_labels, seed)
    return None if options.encoding in (None, DENSE) else Quantized(options.encoding, source.num_classes)


def _specs(source: TargetStore, options: TranscodeOptions, encoding: LogitEncoding | None) -> tuple[ArraySpec, ...]:
    kept = [spec for spec in source.arrays if logical_array(spec.name) in _kept_names(source, options)]
    types = _float_types(tuple(kept), source.manifest.top_k)
    wider = [name for name, dtype in types.items() if options.dtype == "float32" and dtype == "float16"]
    if wider:
        raise StoreError(
            f"{wider[0]} of {source.path} is float16, which float32 would not make more precise: omit dtype, or "
            "cache again as float32."
        )
    specs = [spec if spec.dtype != "float32" else replace(spec, dtype=options.dtype or spec.dtype) for spec in kept]
    specs = _feature_specs(source, specs, options.feature_dtype)
    if options.encoding == HEAD or (encoding == source.manifest.encoding and not decodes_head(source, options)):
        return tuple(specs)
    dense = next((spec for spec in specs if spec.name == "logits"), None)
    if dense and len(dense.row_shape) != 1:
        raise StoreError(f"{source.path} has logits of shape {list(dense.row_shape)}: one logit per class is needed.")
    dtype = _logits_dtype(source, options)
    logits = encoding.arrays(dtype) if encoding else (ArraySpec("logits", (source.num_classes,), dtype),)
    return (*logits, *[spec for spec in specs if logical_array(spec.name) != "logits"])


def _feature_specs(source: TargetStore, specs: list[ArraySpec], dtype: str | None) -> list[ArraySpec]:
    """Return the arrays with feature maps in another type."""
    if dtype is None:
        return specs
    if dtype not in ("int8", "float16"):
        raise StoreError(f"feature maps cannot be converted to {dtype!r}, only to int8, and from it to float16.")
    whole = [spec for spec in specs if logical_array(spec.name) == spec.name]
    if dtype == "int8":
        changed = [pair for spec in whole for pair in quantized_specs(spec)]
    else:
        changed = [replace(spec, dtype=dtype) if is_quantized(spec) else spec for spec in whole]
    if [spec for spec in changed if spec not in specs]:
        return [*changed, *[spec for spec in specs if spec.name.startswith("logits/")]]
    kind = "feature maps in float that would be smaller in int8" if dtype == "int8" else "feature maps in int8"
    raise StoreError(f"{source.path} has no {kind}: omit feature_dtype.")


def _logits_dtype(source: TargetStore, options: TranscodeOptions) -> str:
    """Return the type of logits that are made of a store's, whose own it is by default."""
    from_vectors = decodes_head(source, options)
    return options.dtype or (source.spec(EMBEDDINGS).dtype if from_vectors else source.manifest.logits_dtype)


def _float_types(specs: tuple[ArraySpec, ...], top_k: TopK | None) -> dict[str, str]:
    """Return the type of floating-point numbers, by array, the logits in packed rows included, but no tails."""
    whole = [spec for spec in specs if spec.name != TAIL and logical_map(spec.name) == spec.name]
    types = {spec.name: spec.dtype for spec in whole if spec.dtype in MANTISSA_BITS}
    return types | ({PACKED: top_k.dtype} if top_k and top_k.dtype else {})


def _kept_names(source: TargetStore, options: TranscodeOptions) -> set[str]:
    names = list(dict.fromkeys(logical_array(spec.name) for spec in source.arrays))
    for name in options.arrays or ():
        if name not in names:
            raise StoreError(f"{source.path} has no array {name!r}; {did_you_mean(name, names)}")
    if options.encoding == HEAD:
        return ({*names} if options.arrays is None else {EMBEDDINGS, *options.arrays}) - {"logits"}
    if options.arrays is None:
        return set(names)
    always = [] if decodes_head(source, options) else ["logits" if "logits" in names else EMBEDDINGS]
    return {*always, *options.arrays}


def decodes_head(source: TargetStore, options: TranscodeOptions) -> bool:
    """Return whether logits that follow from a head are to be stored."""
    is_asked = options.encoding not in {None, HEAD} or options.top_k is not None or options.sampled_labels is not None
    return source.manifest.logits_from_head and is_asked


def logical_array(name: str) -> str:
    """Return the logical array that `name` belongs to: encoded logits are one to three arrays, 8-bit maps two."""
    return "logits" if name.startswith("logits/") else logical_map(name)


def _unit_rows(source: TargetStore, specs: tuple[ArraySpec, ...]) -> int:
    new = [spec for spec in specs if spec not in source.arrays]
    aligned = math.lcm(source.unit_rows, *(PAGE_BYTES // math.gcd(spec.row_bytes, PAGE_BYTES) for spec in new))
    widest = max(spec.row_bytes for spec in (*source.arrays, *specs))
    return aligned if aligned * widest <= MAX_REGROUPED_BYTES else source.unit_rows


def _rounded(
    source: TargetStore, specs: tuple[ArraySpec, ...], encoding: LogitEncoding | None, keep_bits: int | None
) -> dict[str, int]:
    """Return the mantissa bits kept, by array. Earlier rounding stays recorded, but that of logits encoded since."""
    before = dict(source.manifest.rounded)
    top_k = encoding if isinstance(encoding, TopK) else None
    for name in ("logits", VALUES):
        if top_k and name in before:
            before[PACKED] = before[name]
    widths = {name: MANTISSA_BITS[dtype] for name, dtype in _float_types(specs, top_k).items()}
    if keep_bits is not None and not widths:
        raise StoreError(f"{source.path} has no floating-point numbers to round: omit keep_bits.")
    if keep_bits is not None and not 1 <= keep_bits < max(widths.values()):
        raise StoreError(
            f"keep_bits is {keep_bits}, and the widest array of {source.path} has {max(widths.values())} bits in its "
            f"mantissa: choose from 1 to {max(widths.values()) - 1}."
        )
    kept = {name: before.get(name, bits) for name, bits in widths.items()}
    kept = {name: min(bits, widths[name], keep_bits or bits) for name, bits in kept.items()}
    return {name: bits for name, bits in kept.items() if name in before or bits < widths[name]}
