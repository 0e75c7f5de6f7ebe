"""Boxes in pictures, one for each sample: drawn as torchvision draws them, or about a centre, and painted over."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stages.views.draw import Draw

_TOP, _LEFT, _AREA, _SHAPE = 0, 1, 2, 3
"""Parameters of a box; each further try draws area and shape from two numbers further on."""

_NUM_TRIES = 10
NUM_BOX_PARAMETERS = 2 + 2 * _NUM_TRIES
"""Random numbers that `random_boxes` takes, from 0 on."""

_NUM_SHAPES = 4096


class Boxes(NamedTuple):
    """One box of each sample, in pixels: all int64 [B], on the CPU."""

    tops: Tensor
    lefts: Tensor
    heights: Tensor
    widths: Tensor


def random_boxes(
    draw: Draw, size: tuple[int, int], most: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Boxes anywhere in pictures of `size` (H, W), with areas and widths over heights within `scale` and `ratio`.

    As torchvision draws them: of ten tries the first that gives a box of 1 x 1 to `most` (h, w); after ten in vain
    the box is 0 x 0.
    """
    heights, widths = torch.zeros(2, len(draw.sample_ids), dtype=torch.int64)
    waiting = torch.arange(len(draw.sample_ids))
    for number in range(_NUM_TRIES):
        if not len(waiting):
            break
        tried = _sides(draw.at(waiting), size[0] * size[1], scale, ratio, 2 * number)
        fits = (tried >= 1).all(0) & (tried <= torch.tensor(most)[:, None]).all(0)
        heights[waiting[fits]], widths[waiting[fits]] = tried[:, fits]
        waiting = waiting[~fits]
    return Boxes(up_to(draw, size[0] - heights, _TOP), up_to(draw, size[1] - widths, _LEFT), heights, widths)


def up_to(draw: Draw, most: Tensor, parameter: int) -> Tensor:
    """Integers from 0 to `most`, int64 [B], below 2^31, which each sample has its own of: int64 [B]."""
    return (draw.below(2**31, parameter) * (most + 1)) >> 31


def _sides(draw: Draw, picture_area: int, scale: tuple[float, float], ratio: tuple[float, float], first: int) -> Tensor:
    """Height and width of a box, int64 [2, B], which may be too large for the picture, or nothing."""
    areas = picture_area * draw.uniform(*scale, first + _AREA)
    ratios = _ratios(*ratio)[draw.below(_NUM_SHAPES, first + _SHAPE)]
    return torch.stack([areas / ratios, areas * ratios]).sqrt_().round_().to(torch.int64)


@lru_cache
def _ratios(low: float, high: float) -> Tensor:
    """Numbers evenly spaced from `low` to `high` on a logarithmic scale, float64 [_NUM_SHAPES].

    A table, since the last bits of exp depend on the machine, and within a tensor on the place: made of Python's,
    rounded to what survives that, it gives each sample the same box everywhere.
    """
    step = math.log(high / low) / _NUM_SHAPES
    shares = [low * math.exp(step * (number + 0.5)) for number in range(_NUM_SHAPES)]
    return torch.tensor([round(share * 2**24) / 2**24 for share in shares], dtype=torch.float64)


def boxes_around(rows: Tensor, columns: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int]) -> Boxes:
    """Boxes about the centres (rows, columns), cut off at the border of pictures of `size` (H, W); all int64 [B].

    A box of even height has one row more above its centre than below.
    """
    tops, lefts = rows - heights // 2, columns - widths // 2
    bottoms, rights = (tops + heights).clamp_(max=size[0]), (lefts + widths).clamp_(max=size[1])
    tops, lefts = tops.clamp_(min=0), lefts.clamp_(min=0)
    return Boxes(tops, lefts, bottoms - tops, rights - lefts)


def pasted(images: Tensor, others: Tensor, boxes: Boxes) -> Tensor:
    """Images [B, C, H, W] that show the `others`, of that shape or expanding to it, inside their box; all uint8."""
    rows = _within(boxes.tops, boxes.heights, images.shape[2], images.device)
    columns = _within(boxes.lefts, boxes.widths, images.shape[3], images.device)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    # as torch.where(inside, others, images), which takes twenty times as long for bytes
    return (images ^ others).bitwise_and_(inside).bitwise_xor_(images)


def _within(starts: Tensor, lengths: Tensor, num_places: int, device: torch.device) -> Tensor:
    """255 for places from starts[b] on, as many as lengths[b], and 0 for others: uint8 [B, num_places]."""
    after = torch.arange(num_places) - starts[:, None]
    within = (after >= 0) & (after < lengths[:, None])
    return within.to(torch.uint8).mul_(255).to(device, non_blocking=True)
