"""Outputs of a teacher for a batch: its logits in any encoding, and features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import TopK, interpolation
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import HEADER_BYTES, PACKED, Quantized
from kdpipe.store.format.encodings.quantized_maps import range_array
from kdpipe.store.format.encodings.sampled import ABSENT, Sampled
from kdpipe.store.format.encodings.topk import INDICES, TAIL, VALUES

NO_LOGITS = (
    "the store has the teacher's embeddings and no logits: use losses on features or relations, such as cosine, hint, "
    "rkd, pkt, sp and cc, with the teacher layer 'pre_logits'."
)


class TeacherTargets(Protocol):
    """Outputs of a teacher for a batch, computed or read from a store."""

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        """Return the required features, [B, ...], and the teacher's head, [C, D + 1]."""

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, that are exact in a softmax at `temperature`."""

    def rows(self, index: Tensor) -> TeacherTargets:
        """Return the outputs for some of the samples, index int64 [n]."""


def feature_rows(features: Mapping[FeatureSpec, Tensor], index: Tensor) -> dict[FeatureSpec, Tensor]:
    """Return the features of some of the samples, index int64 [n]; the teacher's head is one for all."""
    return {feature: rows if feature.is_head else rows[index] for feature, rows in features.items()}


def head_logits(vectors: Tensor, head: Tensor) -> Tensor:
    """Compute the logits [B, C] of pooled vectors [B, D] with a teacher's head [C, D + 1], in float32 on any device."""
    with torch.autocast(vectors.device.type, enabled=False), tf32(enabled=False):
        return torch.addmm(head[:, -1], vectors, head[:, :-1].T)


def concatenated(outputs: Sequence[Any]) -> Any:
    """Return outputs of one teacher for several batches, or parts of them, as those of one batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(outputs))
    if isinstance(first, Mapping):
        return {key: first[key] if key.is_head else torch.cat([one[key] for one in outputs]) for key in first}
    if not hasattr(first, "logits_at") or len(outputs) == 1:
        return first
    parts = {field.name: [getattr(one, field.name) for one in outputs] for field in fields(first)}
    return replace(first, **{name: concatenated(values) for name, values in parts.items()})


@dataclass(frozen=True)
class DenseTargets:
    """Teacher outputs with all logits, [B, num_classes]: the same at any temperature; None for embeddings alone."""

    logits: Tensor | None
    features: Mapping[FeatureSpec, Tensor]

    def logits_at(self, temperature: float) -> Tensor:
        if self.logits is None:
            raise RecipeError(NO_LOGITS)
        return self.logits

    def rows(self, index: Tensor) -> DenseTargets:
        logits = None if self.logits is None else self.logits[index]
        return DenseTargets(logits, feature_rows(self.features, index))


@dataclass(frozen=True)
class TopKTargets:
    """Top-k logits of a batch.

    Attributes:
        values, indices: The largest logits and their classes, [B, k].
        tail: Log-odds of the rest, [B, num_temperatures].
        rest: Logits [B, num_classes] that the mass of the rest is spread by; None for an equal share of each class.
    """

    top_k: TopK
    values: Tensor
    indices: Tensor
    tail: Tensor
    features: Mapping[FeatureSpec, Tensor]
    rest: Tensor | None = None

    def rows(self, index: Tensor) -> TopKTargets:
        features, rest = feature_rows(self.features, index), None if self.rest is None else self.rest[index]
        return TopKTargets(self.top_k, self.values[index], self.indices[index], self.tail[index], features, rest)

    def with_rest_of(self, logits: Tensor) -> TopKTargets:
        """Return the same with the mass of the rest spread as in these logits [B, num_classes], without gradient.

        A divergence then compares the kept classes and the sum of all others.
        """
        return replace(self, rest=logits.detach().float())

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, for a softmax at `temperature`.

        The k largest are as stored. All others have the total probability that they had, in equal shares or as `rest`.

        Raises:
            StoreError: The temperature is outside the store's range.
        """
        kept = self.values.float()
        weights = torch.from_numpy(interpolation(self.top_k, temperature)).float().to(kept.device, non_blocking=True)
        log_odds = self.tail.float() @ weights
        rest = torch.logsumexp(kept / temperature, 1) + log_odds
        if self.rest is None:
            rest = rest - math.log(self.top_k.num_classes - self.top_k.k)
            dense = (temperature * rest)[:, None].repeat(1, self.top_k.num_classes)
        else:
            others = (self.rest / temperature).scatter(1, self.indices.long(), -math.inf)
            dense = temperature * (rest[:, None] + others.log_softmax(1))
        return dense.scatter(1, self.indices.long(), kept)


@dataclass(frozen=True)
class SampledTargets:
    """Sampled labels of a batch: the logarithms of the weights of the drawn classes, and these classes, [B, k]."""

    sampled: Sampled
    values: Tensor
    indices: Tensor
    features: Mapping[FeatureSpec, Tensor]

    def rows(self, index: Tensor) -> SampledTargets:
        features = feature_rows(self.features, index)
        return SampledTargets(self.sampled, self.values[index], self.indices[index], features)

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, whose softmax at T = 1 has the weights; others raise StoreError."""
        self.sampled.require_temperature(temperature)
        kept = self.values.float()
        return kept.new_full((len(kept), self.sampled.num_classes), ABSENT).scatter(1, self.indices, kept)


@dataclass(frozen=True)
class TransformedTargets:
    """Outputs of a teacher with a function of (logits, temperature) applied to its logits."""

    inner: TeacherTargets
    transform: Callable[[Tensor, float], Tensor]

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        return self.inner.features

    def logits_at(self, temperature: float) -> Tensor:
        return self.transform(self.inner.logits_at(temperature), temperature)

    def rows(self, index: Tensor) -> TransformedTargets:
        return TransformedTargets(self.inner.rows(index), self.transform)


def teacher_targets(
    encoding: LogitEncoding | None, arrays: Mapping[str, Tensor], features: Mapping[FeatureSpec, Tensor]
) -> TeacherTargets:
    """Return the outputs of a batch from the rows of a store's arrays, [B, ...] by name, on the device."""
    if isinstance(encoding, TopK):
        return TopKTargets(encoding, *unpack_topk(encoding, arrays), features)
    if isinstance(encoding, Sampled):
        return SampledTargets(encoding, *unpack_sampled(encoding, arrays[PACKED]), features)
    if isinstance(encoding, Quantized):
        return DenseTargets(dequantize(encoding, arrays[PACKED]), features)
    return DenseTargets(arrays["logits"].float() if "logits" in arrays else None, features)


def decode_features(arrays: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the features of an array, float32 [B, ...]; of maps in 8 bits with the ranges of their channels."""
    rows, ranges = arrays[name].float(), arrays.get(range_array(name))
    if ranges is None:
        return rows
    low, step = ranges.float().unbind(1)
    return (
        low[..., None, None] + step[..., None, None] * rows if rows.dim() == 4 else low[:, None] + step[:, None] * rows
    )


def unpack_sampled(encoding: Sampled, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the weights, float16, and the classes, int64, [B, k], of rows, uint8 [B, bytes]."""
    values = packed[:, : 2 * encoding.k].contiguous().view(torch.float16)
    return values, unpack_classes(packed[:, 2 * encoding.k :], encoding.k, encoding.bits)


def unpack_topk(encoding: TopK, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values [B, k], classes [B, k] and tails [B, G] of rows of a store's arrays."""
    if encoding.dtype is None:
        return arrays[VALUES], arrays[INDICES], arrays[TAIL]
    packed, (tail, classes) = arrays[PACKED], encoding.ends
    values = packed[:, :tail].contiguous().view(getattr(torch, encoding.dtype))
    tails = packed[:, tail:classes].contiguous().view(torch.float16)
    return values, unpack_classes(packed[:, classes:], encoding.k, encoding.bits), tails


def unpack_classes(packed: Tensor, k: int, bits: int) -> Tensor:
    """Return the classes, int64 [B, k], of so many bits each in rows, uint8 [B, bytes].

    A class is in the window of bytes that begins with the byte of its first bit.
    """
    num_bytes, length = (bits + 14) // 8, packed.shape[1]
    padded = torch.nn.functional.pad(packed, (0, num_bytes - 1)).to(torch.int32 if bits <= 24 else torch.int64)
    windows = padded[:, :length]
    for byte in range(1, num_bytes):
        windows = windows | padded[:, byte : byte + length] << 8 * byte
    starts = torch.arange(0, k * bits, bits, device=packed.device, dtype=padded.dtype)
    classes: Tensor = windows.index_select(1, starts // 8) >> starts % 8 & 2**bits - 1
    return classes.long()


def dequantize(encoding: Quantized, packed: Tensor) -> Tensor:
    """Decode quantized logits, uint8 [B, bytes], to float32 [B, num_classes] on their device."""
    header = packed[:, :HEADER_BYTES].contiguous().view(torch.float16).float()
    codes = packed[:, HEADER_BYTES:].long()
    tables = torch.from_numpy(encoding.tables).to(packed.device, non_blocking=True)
    # gather is several times as fast as an index on a CPU
    columns = [table.expand(len(codes), -1).gather(1, codes) for table in tables]
    places = columns[0] if len(columns) == 1 else torch.stack(columns, 2).flatten(1)[:, : encoding.num_classes]
    return header[:, :1] - header[:, 1:] * places
