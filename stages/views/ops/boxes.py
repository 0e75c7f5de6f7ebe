"""Boxes in images, one for each sample: random as in torchvision, or around a center; and pasting into them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdpipe.stages.views.rng import CounterRNG

_TOP, _LEFT, _AREA, _SHAPE = 0, 1, 2, 3
"""Parameters of a box; each further try draws area and shape from the next two numbers."""

_NUM_TRIES = 10
NUM_BOX_PARAMETERS = 2 + 2 * _NUM_TRIES
"""Number of parameters that `random_boxes` uses, from 0 on."""

_NUM_SHAPES = 4096


class Boxes(NamedTuple):
    """One box for each sample, in pixels: all int64 [B], on the CPU."""

    tops: Tensor
    lefts: Tensor
    heights: Tensor
    widths: Tensor


def random_boxes(
    rng: CounterRNG,
    size: tuple[int, int],
    max_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Boxes:
    """Draw boxes in images of `size` (H, W), with area fraction and width over height within `scale` and `ratio`.

    As in torchvision: the first of ten tries that gives a box of 1 x 1 to `max_size` (h, w); else 0 x 0.
    """
    heights, widths = torch.zeros(2, len(rng.sample_ids), dtype=torch.int64)
    waiting = torch.arange(len(rng.sample_ids))
    for number in range(_NUM_TRIES):
        if not len(waiting):
            break
        tried = _sides(rng.at(waiting), size[0] * size[1], scale, ratio, 2 * number)
        fits = (tried >= 1).all(0) & (tried <= torch.tensor(max_size)[:, None]).all(0)
        heights[waiting[fits]], widths[waiting[fits]] = tried[:, fits]
        waiting = waiting[~fits]
    return Boxes(
        integers_up_to(rng, size[0] - heights, _TOP), integers_up_to(rng, size[1] - widths, _LEFT), heights, widths
    )


def integers_up_to(rng: CounterRNG, maxima: Tensor, parameter: int) -> Tensor:
    """Draw integers from 0 to each sample's maximum, int64 [B], below 2^31: int64 [B]."""
    return (rng.integers(2**31, parameter) * (maxima + 1)) >> 31


def _sides(
    rng: CounterRNG, image_area: int, scale: tuple[float, float], ratio: tuple[float, float], first: int
) -> Tensor:
    """Draw height and width of a box, int64 [2, B], which may exceed the image or be 0."""
    areas = image_area * rng.uniform(*scale, first + _AREA)
    ratios = _ratios(*ratio)[rng.integers(_NUM_SHAPES, first + _SHAPE)]
    return torch.stack([areas / ratios, areas * ratios]).sqrt_().round_().to(torch.int64)


@lru_cache
def _ratios(low: float, high: float) -> Tensor:
    """Return numbers evenly spaced from `low` to `high` on a logarithmic scale, float64 [_NUM_SHAPES].

    A table of rounded numbers, since the last bits of exp depend on the machine, and within a tensor on the position.
    """
    step = math.log(high / low) / _NUM_SHAPES
    values = [low * math.exp(step * (number + 0.5)) for number in range(_NUM_SHAPES)]
    return torch.tensor([round(value * 2**24) / 2**24 for value in values], dtype=torch.float64)


def boxes_around(rows: Tensor, columns: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int]) -> Boxes:
    """Return boxes around the centers (rows, columns), clipped to images of `size` (H, W); all int64 [B].

    A box of even height has one row more above its center than below.
    """
    tops, lefts = rows - heights // 2, columns - widths // 2
    bottoms, rights = (tops + heights).clamp_(max=size[0]), (lefts + widths).clamp_(max=size[1])
    tops, lefts = tops.clamp_(min=0), lefts.clamp_(min=0)
    return Boxes(tops, lefts, bottoms - tops, rights - lefts)


def paste(images: Tensor, others: Tensor, boxes: Boxes) -> Tensor:
    """Return images [B, C, H, W] with `others`, broadcastable to that shape, inside their boxes; all uint8."""
    rows = _within(boxes.tops, boxes.heights, images.shape[2], images.device)
    columns = _within(boxes.lefts, boxes.widths, images.shape[3], images.device)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    # same as torch.where(inside, others, images), which is twenty times slower for bytes
    return (images ^ others).bitwise_and_(inside).bitwise_xor_(images)


def _within(starts: Tensor, lengths: Tensor, length: int, device: torch.device) -> Tensor:
    """Return 255 for the lengths[b] places from starts[b] on, and 0 for others: uint8 [B, length]."""
    after = torch.arange(length) - starts[:, None]
    within = (after >= 0) & (after < lengths[:, None])
    return within.to(torch.uint8).mul_(255).to(device, non_blocking=True)
