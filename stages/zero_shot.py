"""A zero-shot classifier: the cosines of an image's embedding with those of the class names.

CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
The embeddings of the class names come from a file, so that no tower for texts is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError, cause
from kdpipe.stages.models.build import ModelConfig, weights_path
from kdpipe.stages.models.classes import read_class_list, rows_of_classes

KEY = "teacher.class_embeddings"

NAMES = "names"
"""The entry of the file's metadata with its class names, a JSON list; else they are in a .json file beside it."""


class ZeroShot(nn.Module):
    """A network that returns logits: scale * cosine of an image's embedding and that of each class."""

    def __init__(self, tower: nn.Module, classes: Tensor, scale: float) -> None:
        """Wrap a network that returns embeddings [B, D]; those of the classes are float32 [C, D]."""
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(classes.shape[1], classes.shape[0], bias=False).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.copy_(scale * F.normalize(classes, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.normalize(self.tower(images), dim=1))
        return logits


def zero_shot(
    tower: nn.Module, path: str, scale: float, class_names: Sequence[str], image_shape: tuple[int, int, int]
) -> ZeroShot:
    """Return a classifier of these classes, from a network that returns embeddings and a file of class embeddings.

    Raises:
        RecipeError: The file cannot be read, lacks a class, or has embeddings of another width than the network.
    """
    known, embeddings = class_names_of(path), _embeddings(path)
    if len(known) != len(embeddings):
        raise RecipeError(f"{KEY}: {path} has {len(embeddings)} embeddings and {len(known)} names.")
    rows = rows_of_classes(class_names, known, path, KEY)
    with torch.no_grad():
        width = tower.eval()(torch.zeros(2, *image_shape)).shape[1]
    if width != embeddings.shape[1]:
        raise RecipeError(
            f"{KEY}: {path} has embeddings of {embeddings.shape[1]} numbers, and the network returns {width}: compute "
            "them with the text tower that belongs to it."
        )
    return ZeroShot(tower, embeddings[rows], scale)


def class_names_of(path: str) -> list[tuple[str, ...]]:
    """Return the names of the classes in a file of class embeddings. Raises RecipeError if it has none."""
    file = weights_path(path)
    try:
        with safetensors.safe_open(file, "pt") as opened:
            names = json.loads((opened.metadata() or {}).get(NAMES, "null"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RecipeError(f"{KEY}: {path} cannot be read as safetensors ({cause(error)}).") from error
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return [(name,) for name in names]
    if not (beside := file.with_suffix(".json")).is_file():
        raise RecipeError(
            f"{KEY}: {path} has no class names: write them as a JSON list to {beside}, or to its metadata as {NAMES!r}."
        )
    return read_class_list(ModelConfig(name="classes", classes=str(beside)))


def _embeddings(path: str) -> Tensor:
    """Return the class embeddings of a file, float32 [C, D]."""
    with safetensors.safe_open(Path(weights_path(path)), "pt") as opened:
        tensors = [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118 - not a dict
    if len(tensors) != 1 or tensors[0].dim() != 2 or not tensors[0].is_floating_point():
        raise RecipeError(f"{KEY}: {path} must hold one tensor of floating-point numbers [classes, width].")
    if not tensors[0].isfinite().all() or not tensors[0].float().norm(dim=1).all():
        raise ModelError(f"{path} holds NaN, infinity or an embedding of zeros.")
    found: Tensor = tensors[0].float()
    return found
