"""Views: augmented versions of a sample that teacher and student both see, bit for bit.

A view is a pure function of (seed, sample id, view number). The tensor engine here augments whole batches of uint8
images wherever they lie; its parameters come from a counter-based generator, so neither batch size, order, worker
nor device changes them. Why it matters: Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and
consistent" (arXiv 2106.05237).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from stages.config import section

ENGINE_VERSION = 1
"""Raised whenever the same parameters would give other pixels: stores of an older engine are then refused."""

_CROP_DOWN, _CROP_RIGHT, _FLIP = 1, 2, 3
"""One stream of random numbers for each operation: adding an operation leaves the others' numbers alone."""

_WORD = 2**64


@section
class ViewsConfig:
    """Which views there are, and how they are made.

    num_views: V, how many of each sample are cached; epoch e of a student uses view e mod V.
    crop_padding: pixels of black added on every side before a crop of the original size is taken at random.
    flip: mirror left to right, every other time.
    """

    num_views: Annotated[int, Field(ge=1, le=100_000)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    crop_padding: Annotated[int, Field(ge=0, le=1024)] = 0
    flip: bool = False


def render(images: Tensor, sample_ids: Tensor, view: int, config: ViewsConfig) -> Tensor:
    """The views number `view` of a batch: uint8 [B, C, H, W] and ids int64 [B] give uint8 [B, C, H, W].

    `view` may be any integer. Stores hold the views 0 to V - 1; the teacher's own training uses those below zero.
    """
    if not config.crop_padding and not config.flip:
        return images
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device).expand(len(images), height)
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    if config.flip:
        mirrored = _below(2, config.seed, sample_ids, view, _FLIP)[:, None] == 1
        columns = torch.where(mirrored, columns.flip(1), columns)
    if config.crop_padding:
        most = 2 * config.crop_padding + 1
        rows = rows + _below(most, config.seed, sample_ids, view, _CROP_DOWN)[:, None] - config.crop_padding
        columns = columns + _below(most, config.seed, sample_ids, view, _CROP_RIGHT)[:, None] - config.crop_padding
    return _pick(images, rows, columns)


def identity(config: ViewsConfig, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What decides the pixels of every view, as JSON, with a digest of probe views for images of `shape` (C, H, W).

    V is left out: a store with more views of the same recipe holds the same pictures. The probes are a fixed
    pattern, not samples of the data set, so that a student on a part of the data set can render them too; that the
    samples themselves are the same is checked by their pixel checksums.
    """
    operations: list[dict[str, Any]] = []
    if config.flip:
        operations.append({"flip": {"probability": 0.5}})
    if config.crop_padding:
        operations.append({"crop": {"padding": config.crop_padding, "fill": 0}})
    return {
        "engine": "tensor",
        "engine_version": ENGINE_VERSION,
        "seed": config.seed,
        "operations": operations,
        "image_shape": list(shape),
        "probe_sha256": _probe_digest(config, shape),
    }


def _probe_digest(config: ViewsConfig, shape: tuple[int, int, int], num_probes: int = 8) -> str:
    cells = num_probes * shape[0] * shape[1] * shape[2]
    pattern = (torch.arange(cells) * 31 % 251).to(torch.uint8).reshape(num_probes, *shape)
    digest = hashlib.sha256()
    for view in range(3):
        digest.update(render(pattern, torch.arange(num_probes), view, config).numpy().tobytes())
    return digest.hexdigest()


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[b, c, i, j] = images[b, c, rows[b, i], columns[b, j]], black where that lies outside the image."""
    batch, channels, height, width = images.shape
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = flat.reshape(batch, 1, -1).expand(batch, channels, -1)
    picked = images.reshape(batch, channels, -1).gather(2, index).reshape(images.shape)
    return picked * inside[:, None]


def _below(bound: int, seed: int, sample_ids: Tensor, view: int, operation: int) -> Tensor:
    """Random integers in [0, bound), int64 [B]: a hash of (seed, sample id, view, operation) and nothing else."""
    key = _mix_int(_mix_int(_mix_int(seed) + view) + operation)
    bits = _mix(_mix(sample_ids ^ _signed(key)) + _signed(_mix_int(key)))
    return (_shift(bits, 32) * bound) >> 32


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, which wraps as uint64 does."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _WORD
    return x ^ (x >> 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift int64 right and fill with zeros: torch's own >> copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - _WORD if x >= _WORD // 2 else x
