"""The transforms engine: runs any pipeline of torchvision.transforms.v2 on one image after the other.

The pipeline gets a PIL image: Pillow computes in integers, the same ones on every machine. Whoever wants tensors begins
with ToImage.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stages.errors import RecipeError, cause
from stages.python_reference import source_sha256
from stages.views.build_transform import Transform, build_transform
from stages.views.config import ViewsConfig
from stages.views.global_generators import generators_kept, seed_generators

__all__ = ["apply", "build_transform", "describe", "require_pure"]

Pixels: TypeAlias = NDArray[np.uint8]

ENGINE_VERSION = 1
"""Raised whenever the same pipeline would give other pixels: stores of an older engine are then refused."""

NUM_TRIALS = 16
"""A flip by a generator of its own, with probability one half, escapes `require_pure` once in 2^16."""


def apply(transform: Transform, pixels: Pixels, sample_id: int, view: int, seed: int) -> Tensor:
    """The view of one image: uint8 [C, H, W], of 1 or 3 channels, to uint8 [C, H', W'].

    A pure function of its arguments, whatever the process and whatever was rendered before, if `transform` draws from
    the global generators of torch (on the CPU), numpy and random alone; they are left as they were. To render many
    images, do so within one `generators_kept()`, which takes most of the cost of that away.

    Raises RecipeError, naming the sample, where the transform fails or does not return such an image.
    """
    with generators_kept():
        seed_generators(seed, sample_id, view)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results only
                result = transform(_picture(pixels))
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code, or a pipeline that does not fit together
            raise RecipeError(f"[views]: the transforms fail on sample {sample_id} ({cause(error)}).") from error
    return _as_view(result, len(pixels), f"[views]: of sample {sample_id}, the transforms make")


def require_pure(transform: Transform, pixels: Pixels) -> None:
    """Raise RecipeError if two renderings of `pixels`, uint8 [C, H, W], as the same sample and view differ."""
    with generators_kept():
        first = [apply(transform, pixels, number, number, 0) for number in range(NUM_TRIALS)]
        for number in reversed(range(NUM_TRIALS)):  # another order: nor may a view depend on the one before
            if not torch.equal(first[number], apply(transform, pixels, number, number, 0)):
                raise RecipeError(
                    "[views]: the transforms make two different views of one and the same sample: they must draw from "
                    "the global generators of torch, numpy (np.random.*) and random alone, which are seeded for each "
                    "sample and view, not from one of their own (default_rng(), torch.Generator()) or the clock."
                )


def describe(config: ViewsConfig) -> dict[str, Any]:
    """What decides the pixels, as JSON. Raises RecipeError where the file of `views.transform` cannot be read."""
    described = {
        "engine": "transforms",
        "engine_version": ENGINE_VERSION,
        "operations": json.loads(json.dumps(config.operations, default=str)),
    }
    if config.transform is None:
        return described
    digest = source_sha256(config.transform, "views.transform", RecipeError)
    return {**described, "transform": config.transform, "transform_source_sha256": digest}


def _picture(pixels: Pixels) -> Image.Image:
    planes = [Image.fromarray(plane) for plane in pixels]
    return planes[0] if len(planes) == 1 else Image.merge("RGB", planes)  # much faster than to transpose


def _as_view(result: Any, channels: int, makes: str) -> Tensor:
    """What a transform returned as uint8 [C, H', W']. `makes` begins the sentence about what cannot be one."""
    if isinstance(result, Image.Image):
        wanted = "L" if channels == 1 else "RGB"
        if result.mode != wanted:
            raise RecipeError(f"{makes} a picture of mode {result.mode!r}, wanted {wanted!r}, as it was before.")
        planes = [result] if channels == 1 else result.split()
        view = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    elif isinstance(result, np.ndarray):
        view = _from_array(result, makes)
    elif isinstance(result, Tensor):
        view = result.detach().cpu().as_subclass(Tensor)
    else:
        raise RecipeError(f"{makes} {_of_type(result)}, wanted a PIL image, a tensor or a numpy array.")
    if view.ndim != 3 or len(view) != channels or not view.numel():
        raise RecipeError(f"{makes} {list(view.shape)}, wanted [{channels}, height, width].")
    return _as_uint8(view, makes).contiguous()


def _from_array(array: NDArray[Any], makes: str) -> Tensor:
    """uint8 [H, W, C], or [H, W] if grey, to [C, H, W]."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise RecipeError(
            f"{makes} a numpy array of {array.dtype} {list(array.shape)}, wanted uint8 [height, width, channels]."
        )
    return torch.from_numpy((array[..., None] if array.ndim == 2 else array).transpose(2, 0, 1).copy())


def _as_uint8(view: Tensor, makes: str) -> Tensor:
    if view.dtype == torch.uint8:
        return view
    if not view.dtype.is_floating_point:
        raise RecipeError(f"{makes} a tensor of {view.dtype}, wanted uint8, or floats in [0, 1].")
    precise = view.to(torch.float64)
    low, high = (float(bound) for bound in precise.aminmax())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise RecipeError(
            f"{makes} numbers from {low:.4g} to {high:.4g}, wanted uint8, or floats in [0, 1]: clamp what overshoots, "
            "and leave Normalize to teacher.mean/std and student.mean/std, for a view comes before each model's own "
            "normalisation."
        )
    return (precise * 255 + 0.5).floor().to(torch.uint8)


def _of_type(result: Any) -> str:
    if isinstance(result, Sequence) and not isinstance(result, str):
        return f"a {type(result).__name__} of {len(result)} things"
    return f"something of type {type(result).__name__}"
