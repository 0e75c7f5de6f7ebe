"""Check for `kdpipe recipe new` that what an answer names is there: folders, files, factories and modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.pipeline.recipe.template import PUBLISHED, STATED, TRAINED_HERE, Answers
from kdpipe.stages.data.names import NUM_CLASSES, SHAPES
from kdpipe.stages.errors import ModelError, RecipeError, first_few

if TYPE_CHECKING:
    from kdpipe.stages.models.modules import ModuleOutput
    from kdpipe.stages.models.normalization import Normalization


def require_data(answers: Answers, root: str) -> None:
    """Raise RecipeError if the folder or file of the data is not there."""
    _, _, path = answers.data.partition(":")
    place = Path(root).expanduser() / Path(path).expanduser()
    if answers.kind == "imagefolder" and not place.is_dir():
        raise RecipeError(
            f"there is no folder {place.absolute()}: name the folder that holds {path}, or move it there."
        )
    if answers.kind in ("npz", "table", "lmdb") and not place.exists():
        raise RecipeError(f"there is no file {place.absolute()}: name the folder that holds {path}, or move it there.")


def require_weights_file(text: str) -> None:
    """Raise RecipeError if an answer names a weights file that is not there."""
    from kdpipe.stages.models.build import weights_path

    if text not in (TRAINED_HERE, PUBLISHED) and not weights_path(text).is_file():
        raise RecipeError(
            f"there is no file {weights_path(text).absolute()}: answer {TRAINED_HERE}, {PUBLISHED} or a file."
        )


def require_factory(reference: str, key: str) -> None:
    """Raise RecipeError or another KdpipeError if a `python:` reference names nothing that can be imported."""
    from kdpipe.stages.plugins.user_code import import_callable, is_user_reference, user_code_context

    if is_user_reference(reference):
        with user_code_context():
            import_callable(reference, key, RecipeError)


def is_stated(answers: Answers) -> bool:
    """Return whether the teacher's weights file, or a file beside it, states its input scaling."""
    from torch import nn

    from kdpipe.stages.models.build import weights_path
    from kdpipe.stages.models.normalization import stated_scalings

    return bool(stated_scalings(nn.Identity(), weights_path(answers.teacher_weights), channels_of(answers)))


def scaling_named(text: str, answers: Answers) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return mean and std of an answer such as "imagenet" or "0.5/0.5"; None where the weights state them.

    Raises:
        RecipeError: It is neither a name nor two numbers, or lists of numbers, one for each channel.
    """
    if text == STATED and is_stated(answers):
        return None
    channels = channels_of(answers)
    known = {name: scaling for name, scaling in scalings().items() if len(scaling.mean) == channels}
    if text.lower() in known:
        return known[text.lower()].mean, known[text.lower()].std
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
    except ValueError:
        names = ", ".join(known)
        raise RecipeError(
            f"{text[:80]!r} is none of {names}, and not MEAN/STD such as 0.5,0.5,0.5/0.2,0.2,0.2."
        ) from None
    mean, std = (part * channels if len(part) == 1 else part for part in (mean, std))
    if not len(mean) == len(std) == channels or min(std) <= 0 or not all(map(math.isfinite, [*mean, *std])):
        raise RecipeError(f"the images have {channels} channels: give a finite number for each, std above 0.")
    return mean, std


def scalings() -> dict[str, Normalization]:
    """Return the usual input scalings of one and of three channels, by the names of answers."""
    from kdpipe.stages.evaluation.trials import SCALINGS
    from kdpipe.stages.models.normalization import Normalization

    names = {"imagenet": "ImageNet's", "cifar10": "CIFAR-10's", "cifar100": "CIFAR-100's", "mnist": "MNIST's"}
    return {name: Normalization(*SCALINGS[known]) for name, known in names.items()}


def channels_of(answers: Answers) -> int:
    """Return the channels of the networks' images, 3 where only the data has them."""
    return answers.channels or SHAPES.get(answers.data, (0, 3, 0))[1] or 3


def modules_of(name: str, answers: Answers) -> list[ModuleOutput]:
    """Return the modules of a network on images of the data's shape; of 64 x 64 where only the data has it.

    None are returned for a network that cannot be built so.
    """
    side = answers.image_size or SHAPES.get(answers.data, (0, 0, None))[2] or 64
    return _modules(name, (channels_of(answers), side, side))


@cache
def _modules(name: str, shape: tuple[int, int, int]) -> list[ModuleOutput]:
    from kdpipe.stages.models.build import ModelConfig, build_model
    from kdpipe.stages.models.modules import list_modules

    try:
        config = ModelConfig(name=name)
        model = build_model(config, num_classes=NUM_CLASSES, in_channels=shape[0], image_size=shape[1:], seed=0)
        return list_modules(model, shape)
    except (ModelError, RecipeError):
        return []


def require_module(role: str, name: str, path: str, answers: Answers) -> None:
    """Raise RecipeError if a network has no module at `path`, where its modules are known."""
    known = [module.path for module in modules_of(name, answers)]
    if known and path not in known:
        raise RecipeError(f"the {role} has no module {path!r}; it has {first_few(known, 8)}.")
