"""Feature maps of 8 bits a number, with a range for each row and channel.

A map `features/LAYER`, uint8 [C, H, W], or tokens [L, D] with D channels, has codes; `range/LAYER`, float16 [2, C], has
the lowest value of each channel and its step:

    value = lowest + step * code.

A range of its own for each row needs no pass over the data, and fits each image; it takes 4 bytes a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.topk import BLOCK_VALUES
from kdpipe.store.format.layout import ArraySpec

FEATURES, RANGE = "features", "range"

MIN_POSITIONS = 5
"""With fewer positions a channel, codes and ranges take as many bytes as float16."""

LARGEST_CODE = 255


def range_array(name: str) -> str:
    """Return the name of the ranges of an array of maps: `range/layer3` of `features/layer3`."""
    return RANGE + name.removeprefix(FEATURES)


def logical_map(name: str) -> str:
    """Return the name of the maps that an array is the codes or the ranges of; other names as they are."""
    is_range = name.partition("/")[0].partition("-")[0] == RANGE
    return FEATURES + name.removeprefix(RANGE) if is_range else name


def is_quantized(spec: ArraySpec) -> bool:
    """Return whether an array has the codes of maps."""
    return spec.dtype == "uint8" and spec.name.startswith(FEATURES)


def quantized_specs(spec: ArraySpec) -> tuple[ArraySpec, ...]:
    """Return the arrays of maps in 8 bits; other features, and maps too small to gain, stay as they are."""
    num_channels = spec.row_shape[0] if len(spec.row_shape) == 3 else spec.row_shape[-1]
    positions = np.prod(spec.row_shape) // num_channels
    if not spec.name.startswith(FEATURES) or len(spec.row_shape) not in (2, 3) or positions < MIN_POSITIONS:
        return (spec,)
    return replace(spec, dtype="uint8"), ArraySpec(range_array(spec.name), (2, num_channels), "float16")


def unpaired(specs: Iterable[ArraySpec]) -> str | None:
    """Return the name of an array of codes without its ranges, or the reverse; None where there is none."""
    by_name = {spec.name: spec for spec in specs}
    wanted = [pair for spec in by_name.values() if is_quantized(spec) for pair in quantized_specs(spec)]
    ranges = {name for name in by_name if logical_map(name) != name}
    wrong = [pair.name for pair in wanted if by_name.get(pair.name) != pair]
    return next(iter([*wrong, *sorted(ranges - {pair.name for pair in wanted})]), None)


def quantize(maps: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return the codes, uint8 [n, ...], and the ranges, float16 [n, 2, C], of maps [n, C, H, W] or tokens [n, L, D].

    Raises StoreError, listing rows, where a row is not finite, or too large for float16.
    """
    num_channels = maps.shape[1 if maps.ndim == 4 else 2]
    codes = np.empty(maps.shape, np.uint8)
    ranges = np.empty((len(maps), 2, num_channels), "<f2")
    step = max(1, BLOCK_VALUES // max(1, maps[:1].size))
    for start in range(0, len(maps), step):
        rows = slice(start, start + step)
        codes[rows], ranges[rows] = _quantized_block(maps[rows])
    bad = np.flatnonzero(~np.isfinite(ranges).all(axis=(1, 2)))
    if len(bad):
        raise StoreError(
            f"the features of {len(bad)} of {len(maps)} rows are not finite, or too large for 8 bits with ranges in "
            f"float16, for example rows {bad[:5].tolist()}: fix the teacher, or store float32."
        )
    return codes, ranges


def _quantized_block(maps: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    axes = (2, 3) if maps.ndim == 4 else (1,)
    with np.errstate(over="ignore", invalid="ignore"):  # reported by `quantize`, by row
        low = maps.min(axis=axes, keepdims=True).astype(np.float16)
        span = maps.max(axis=axes, keepdims=True) - low.astype(np.float32)
        step = (np.maximum(span, 0) / np.float32(LARGEST_CODE)).astype(np.float16)
        places = (maps - low.astype(np.float32)) / np.maximum(step.astype(np.float32), np.float32(1e-30))
        codes = np.where(step > 0, np.clip(np.rint(places), 0, LARGEST_CODE), 0).astype(np.uint8)
    ranges = np.stack([one.reshape(len(maps), -1) for one in (low, step)], axis=1)
    return codes, ranges


def decode_features(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """Return the features [n, ...] of an array, of codes and ranges if the store has both."""
    ranges = arrays.get(range_array(name))
    return arrays[name] if ranges is None else dequantize(arrays[name], ranges)


def dequantize(codes: NDArray[Any], ranges: NDArray[Any]) -> NDArray[np.float32]:
    """Return the maps, float32 [n, ...], of codes [n, ...] and ranges [n, 2, C]."""
    spread = (slice(None), slice(None), None, None) if codes.ndim == 4 else (slice(None), None)
    low, step = (np.asarray(ranges[:, one], np.float32)[spread] for one in (0, 1))
    return np.asarray(low + step * codes.astype(np.float32))
