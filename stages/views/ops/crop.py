"""Crops and flips."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.ops.boxes import Boxes, random_boxes
from kdpipe.stages.views.ops.fields import AreaRange, KeepsSize, Level, Probability, RatioRange, Size, side_lengths
from kdpipe.stages.views.ops.resample import resample
from kdpipe.stages.views.rng import CounterRNG

_DOWN, _RIGHT = 0, 1


@section
class RandomCrop:
    """Pad by `padding` pixels of `fill` on every side, then take a random crop, as torchvision.

    Attributes:
        size: One side, (H, W), or None for the image's own size.
        padding: Pixels on every side; by default 0 if `size` is given, else an eighth of the image's smaller side.
    """

    name: Literal["RandomCrop"]
    size: Size = None
    padding: Annotated[int, Field(ge=0, le=1024)] | None = None
    fill: Level = 0

    def __post_init__(self) -> None:
        if self.size is not None and self.padding is None:
            object.__setattr__(self, "padding", 0)  # the records of stores have it as a number

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the crops.

        Raises:
            RecipeError: The crop is larger than the padded image, could miss the image, or is always the whole image.
        """
        out, padding = side_lengths(self.size, size), self._padding(size)
        if any(side > old + 2 * padding for side, old in zip(out, size, strict=True)):
            raise RecipeError(
                f"RandomCrop to {out[0]} x {out[1]} with padding = {padding} is larger than images of {size[0]} x "
                f"{size[1]}: use a smaller size, or more padding."
            )
        if padding >= min(out):
            raise RecipeError(
                f"RandomCrop with padding = {padding} could crop images of {size[0]} x {size[1]} to nothing: keep "
                f"it below {min(out)}."
            )
        if padding == 0 and out == size:
            raise RecipeError(
                f"RandomCrop to {out[0]} x {out[1]} with padding = 0 changes nothing in images of that size: set a "
                "padding, or a smaller size, or remove the operation."
            )
        return out

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        return self.crop_rows(images, torch.arange(len(images)), rng)

    def crop_rows(self, images: Tensor, rows: Tensor, rng: CounterRNG) -> Tensor:
        """Crop the images at `rows`, int64 [B] on the CPU, of uint8 [N, C, H, W], without copying them first."""
        size = (images.shape[2], images.shape[3])
        (height, width), padding = side_lengths(self.size, size), self._padding(size)
        if images.device.type == "cpu" and (height, width) == images.shape[2:] and images.is_contiguous():
            bound = 2 * padding + 1
            down, right = (rng.integers(bound, parameter) - padding for parameter in (_DOWN, _RIGHT))
            return shift_rows(images, rows, down, right, max_shift=padding, fill=self.fill)
        images = images.index_select(0, rows.to(images.device, non_blocking=True))
        padded = F.pad(images, [padding] * 4, value=self.fill)
        tops = rng.integers(padded.shape[2] - height + 1, _DOWN)
        lefts = rng.integers(padded.shape[3] - width + 1, _RIGHT)
        return windows(padded, tops, lefts, (height, width))

    def _padding(self, size: tuple[int, int]) -> int:
        return max(1, min(size) // 8) if self.padding is None else self.padding


@section
class RandomResizedCrop:
    """Crop a box of random area and shape and resize it to `size` (Szegedy et al. 2015, arXiv 1409.4842).

    Same as torchvision's, bilinear, but without antialiasing, which matters only if a box is larger than `size`.

    Attributes:
        size: One side, (H, W), or None for the image's own size.
        scale: Minimum and maximum area of the box, as fractions of the image's.
        ratio: Minimum and maximum width over height of the box, log-uniform in between.
    """

    name: Literal["RandomResizedCrop"]
    size: Size = None
    scale: AreaRange = (0.08, 1.0)
    ratio: RatioRange = (3 / 4, 4 / 3)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the crops. Raises RecipeError if images of `size` would shrink to less than half."""
        out = side_lengths(self.size, size)
        if 2 * out[0] < size[0] or 2 * out[1] < size[1]:
            raise RecipeError(
                f"RandomResizedCrop with size = {out[0]} x {out[1]} would shrink images of {size[0]} x {size[1]} to "
                f"less than half, and alias: set data.image_size = {2 * min(out)} or less."
            )
        return out

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        size = (images.shape[2], images.shape[3])
        boxes = random_boxes(rng, size, size, self.scale, self.ratio)
        central = (torch.tensor(side) for side in _central_box(size, self.ratio))
        found = boxes.heights > 0
        boxes = Boxes(*(torch.where(found, drawn, fixed) for drawn, fixed in zip(boxes, central, strict=True)))
        return resample(images, boxes, side_lengths(self.size, size))


def _central_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, left, height, width of the largest central box with width over height within `ratio`."""
    height, width = size
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


class _RandomFlip(KeepsSize):
    p: float
    _dim: ClassVar[int]

    @property
    def is_identity(self) -> bool:
        return self.p == 0

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        return self.overwrite(images.clone(), rng)

    def overwrite(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Flip in place."""
        return flip_where(images, rng.bernoulli(self.p, 0), self._dim)


@section
class RandomHorizontalFlip(_RandomFlip):
    """Mirror left to right with probability `p`."""

    name: Literal["RandomHorizontalFlip"]
    p: Probability = 0.5
    _dim = 3


@section
class RandomVerticalFlip(_RandomFlip):
    """Mirror top to bottom with probability `p`."""

    name: Literal["RandomVerticalFlip"]
    p: Probability = 0.5
    _dim = 2


def shift_rows(images: Tensor, rows: Tensor, down: Tensor, right: Tensor, *, max_shift: int, fill: int) -> Tensor:
    """Return out[b, c, i, j] = images[rows[b], c, i + down[b], j + right[b]], or `fill` outside the image.

    The pixels of an image are one run of bytes, so it is copied whole from an offset, and what then comes from another
    row, plane or image is filled. That takes a quarter of the time of copying, padding and cropping.
    Images are uint8 [N, C, H, W], rows and shifts int64 [B], all on the CPU; shifts are in [-max_shift, max_shift].
    """
    num_images, channels, height, width = images.shape
    image_bytes = channels * height * width
    last = (num_images - 1) * image_bytes
    starts = rows * image_bytes + down * width + right
    # There is nothing to copy before the first and after the last image: such runs are fixed below.
    pieces: NDArray[Any] = np.ndarray(last + 1, f"V{image_bytes}", images.numpy(), strides=(1,))
    moved = torch.from_numpy(pieces[starts.clamp(0, last).numpy()].view(np.uint8)).reshape(-1, *images.shape[1:])
    for index in ((starts < 0) | (starts > last)).nonzero()[:, 0].tolist():
        short, by = moved[index].view(-1), int(starts[index].clamp(0, last) - starts[index])
        short.copy_(short.roll(by))
    inside_rows = _mask_by_shift(height, max_shift).index_select(0, down + max_shift)
    inside_columns = _mask_by_shift(width, max_shift).index_select(0, right + max_shift)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    if not fill:
        return moved.bitwise_and_(inside)
    return moved.bitwise_xor_(fill).bitwise_and_(inside).bitwise_xor_(fill)


@lru_cache
def _mask_by_shift(length: int, max_shift: int) -> Tensor:
    """Return, for each shift, 255 for places that stay within the image, else 0: uint8 [2 max_shift + 1, length]."""
    places = torch.arange(length) + torch.arange(-max_shift, max_shift + 1)[:, None]
    return ((places >= 0) & (places < length)).to(torch.uint8).mul_(255)


def windows(images: Tensor, tops: Tensor, lefts: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the window of `size` (h, w) at row tops[b], column lefts[b] of each image: [B, C, h, w].

    Tops and lefts are int64 [B], on the CPU; each window must be within its image.
    """
    if images.device.type == "cpu":
        # numpy copies whole windows; torch's indexing and gathering of bytes are many times slower
        every = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, axis=(2, 3))
        return torch.from_numpy(every[np.arange(len(images)), :, tops.numpy(), lefts.numpy()])
    batch, channels, _, width = images.shape
    tops, lefts = tops.to(images.device, non_blocking=True), lefts.to(images.device, non_blocking=True)
    rows = tops[:, None] + torch.arange(size[0], device=images.device)
    columns = lefts[:, None] + torch.arange(size[1], device=images.device)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1).expand(batch, channels, -1)
    return images.reshape(batch, channels, -1).gather(2, index).reshape(batch, channels, *size)


def flip_where(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Mirror the `chosen` images, bool [B] on the CPU, of uint8 [B, C, H, W] along `dim`, in place."""
    if images.device.type == "cpu":
        # numpy copies whole images; torch selects byte by byte, which is many times slower
        rows = chosen.nonzero()[:, 0]
        images.numpy()[rows.numpy()] = images.index_select(0, rows).flip(dim).numpy()
        return images
    chosen = chosen.to(images.device, non_blocking=True)
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)
