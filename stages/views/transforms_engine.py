"""The transforms engine: run any pipeline of torchvision.transforms.v2, image by image.

The pipeline gets a PIL image, since Pillow computes in integers, the same on every machine. Start it with ToImage for
tensors.
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

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.user_code import source_sha256
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.global_rng import preserve_rng_state, seed_global_rngs
from kdpipe.stages.views.torchvision_pipeline import Transform, build_transform

__all__ = ["apply_transform", "build_transform", "check_deterministic", "transform_identity"]

Pixels: TypeAlias = NDArray[np.uint8]

ENGINE_VERSION = 1
"""Increase it whenever the same pipeline would give other pixels: stores of an older engine are then rejected."""

NUM_TRIALS = 16
"""A flip with probability 1/2 by a private generator escapes `check_deterministic` once in 2^16."""


def apply_transform(transform: Transform, pixels: Pixels, sample_id: int, view: int, seed: int) -> Tensor:
    """Render the view of one image: uint8 [C, H, W], of 1 or 3 channels, to uint8 [C, H', W'].

    A pure function of its arguments, if `transform` draws only from the global generators of torch (on the CPU), numpy
    and random; their state is restored. Render many images within one `preserve_rng_state()`, which saves most of that
    cost.

    Raises:
        RecipeError: The transform fails or does not return such an image.
    """
    with preserve_rng_state():
        seed_global_rngs(seed, sample_id, view)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results only
                result = transform(_to_pil(pixels))
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # user code, or an inconsistent pipeline
            raise RecipeError(f"[views]: the transforms failed on sample {sample_id} ({cause(error)}).") from error
    return _as_view(result, len(pixels), f"[views]: for sample {sample_id}, the transforms return")


def check_deterministic(transform: Transform, pixels: Pixels) -> None:
    """Raise RecipeError if two renderings of `pixels`, uint8 [C, H, W], as the same sample and view differ."""
    with preserve_rng_state():
        first = [apply_transform(transform, pixels, number, number, 0) for number in range(NUM_TRIALS)]
        for number in reversed(range(NUM_TRIALS)):  # in another order: a view must not depend on the one before
            if not torch.equal(first[number], apply_transform(transform, pixels, number, number, 0)):
                raise RecipeError(
                    "[views]: the transforms are not deterministic: they must draw only from the global generators of "
                    "torch, numpy (np.random.*) and random, which are seeded for each sample and view, not from a "
                    "private generator (default_rng(), torch.Generator()) or the clock."
                )


def transform_identity(config: Views) -> dict[str, Any]:
    """Return everything that determines the pixels, as JSON. Raises RecipeError if `views.transform` is unreadable."""
    identity = {
        "engine": "transforms",
        "engine_version": ENGINE_VERSION,
        "operations": json.loads(json.dumps(config.operations, default=str)),
    }
    if config.transform is None:
        return identity
    digest = source_sha256(config.transform, "views.transform", RecipeError)
    return {**identity, "transform": config.transform, "transform_source_sha256": digest}


def _to_pil(pixels: Pixels) -> Image.Image:
    planes = [Image.fromarray(plane) for plane in pixels]
    return planes[0] if len(planes) == 1 else Image.merge("RGB", planes)  # much faster than transposing


def _as_view(result: Any, channels: int, prefix: str) -> Tensor:
    """Convert a transform's result to uint8 [C, H', W']; error messages start with `prefix`."""
    if isinstance(result, Image.Image):
        expected = "L" if channels == 1 else "RGB"
        if result.mode != expected:
            raise RecipeError(f"{prefix} an image of mode {result.mode!r}, expected {expected!r} as in the input.")
        planes = [result] if channels == 1 else result.split()
        view = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    elif isinstance(result, np.ndarray):
        view = _from_array(result, prefix)
    elif isinstance(result, Tensor):
        view = result.detach().cpu().as_subclass(Tensor)
    else:
        raise RecipeError(f"{prefix} {_of_type(result)}, expected a PIL image, a tensor or a numpy array.")
    if view.ndim != 3 or len(view) != channels or not view.numel():
        raise RecipeError(f"{prefix} {list(view.shape)}, expected [{channels}, height, width].")
    return _as_uint8(view, prefix).contiguous()


def _from_array(array: NDArray[Any], prefix: str) -> Tensor:
    """Convert uint8 [H, W, C], or grayscale [H, W], to [C, H, W]."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise RecipeError(
            f"{prefix} a numpy array of {array.dtype} {list(array.shape)}, expected uint8 [height, width, channels]."
        )
    return torch.from_numpy((array[..., None] if array.ndim == 2 else array).transpose(2, 0, 1).copy())


def _as_uint8(view: Tensor, prefix: str) -> Tensor:
    if view.dtype == torch.uint8:
        return view
    if not view.dtype.is_floating_point:
        raise RecipeError(f"{prefix} a tensor of {view.dtype}, expected uint8, or floats in [0, 1].")
    precise = view.to(torch.float64)
    low, high = (float(bound) for bound in precise.aminmax())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise RecipeError(
            f"{prefix} numbers from {low:.4g} to {high:.4g}, expected uint8, or floats in [0, 1]: clamp the "
            "result, and leave Normalize to teacher.mean/std and student.mean/std: views are not normalized."
        )
    return (precise * 255 + 0.5).floor().to(torch.uint8)


def _of_type(result: Any) -> str:
    if isinstance(result, Sequence) and not isinstance(result, str):
        return f"a {type(result).__name__} of {len(result)} items"
    return f"something of type {type(result).__name__}"
