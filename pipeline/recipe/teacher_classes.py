"""Find for `kdpipe recipe new` how the classes of a teacher's weights are those of the data."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.pipeline.recipe.present import channels_of
from kdpipe.pipeline.recipe.template import NEW_CLASSIFIER, PUBLISHED, TRAINED_HERE, Answers, is_small_network
from kdpipe.stages.data.names import SHAPES
from kdpipe.stages.errors import RecipeError
from kdpipe.store.errors import KdpipeError

if TYPE_CHECKING:
    from kdpipe.stages.models.build import ModelConfig

SIDE = 64
"""Of the images that a network is built for, where only the data has it."""


def data_classes(answers: Answers) -> tuple[str, ...]:
    """Return the names of the data's classes, those of class folders; () if they are not known without reading it."""
    from kdpipe.stages.data.sources.image_folder import class_folders

    if answers.kind == "imagefolder":
        with suppress(KdpipeError):
            return class_folders(
                Path(answers.root or "").expanduser() / Path(answers.data.partition(":")[2]).expanduser()
            )
    return ()


def num_data_classes(answers: Answers) -> int:
    """Return the number of the data's classes, 0 if it is not known without reading it."""
    return SHAPES[answers.data][0] if answers.data in SHAPES else len(data_classes(answers))


def num_teacher_classes(answers: Answers) -> int:
    """Return the number of classes of the teacher's weights, 0 if it is not known."""
    with suppress(KdpipeError):
        side = answers.image_size or SHAPES.get(answers.data, (0, 0, None))[2] or SIDE
        shape = channels_of(answers), side, side
        return _num_classes(answers.teacher, answers.teacher_weights, num_data_classes(answers), shape)
    return 0


@cache
def _num_classes(name: str, weights: str, num_data_classes: int, shape: tuple[int, int, int]) -> int:
    from kdpipe.stages.models.build import ModelConfig, build_model, weights_path
    from kdpipe.stages.models.libraries.by_name import num_published_classes
    from kdpipe.stages.models.weights.file import read_weights
    from kdpipe.stages.models.weights.match import width_of

    if weights == PUBLISHED:
        return 0 if is_small_network(name) else num_published_classes(name, {})
    config = ModelConfig(name=name)
    model = build_model(config, num_classes=num_data_classes, in_channels=shape[0], image_size=shape[1:], seed=0)
    layers = [path for path, module in model.named_modules() if width_of(module) == num_data_classes]
    stored = [entries for entries in read_weights(weights_path(weights)).values() if layers]
    rows = (len(value) for entries in stored for key, value in entries.items() if key.endswith(f"{layers[-1]}.weight"))
    return next(rows, 0)


def has_other_classes(answers: Answers) -> bool:
    """Return whether the teacher has weights of more classes than the data, or published ones of as many."""
    if answers.teacher_weights == TRAINED_HERE or not (wanted := num_data_classes(answers)):
        return False
    return num_teacher_classes(answers) > wanted - (answers.teacher_weights == PUBLISHED)


def default_classes(answers: Answers) -> str:
    """Return "published" if the weights' library names the data's classes among theirs, else "none"."""
    with suppress(KdpipeError):
        if data_classes(answers):
            return classes_named(PUBLISHED, answers)
    return NEW_CLASSIFIER


def classes_named(text: str, answers: Answers) -> str:
    """Return an answer: "published", "none", or a file with the names of the weights' classes.

    Raises:
        RecipeError: The file is no such list, or lacks one of the data's classes.
    """
    from kdpipe.stages.models.build import ModelConfig
    from kdpipe.stages.models.classes import read_class_list, rows_of_classes

    if text == NEW_CLASSIFIER:
        return text
    config: ModelConfig = ModelConfig(name=answers.teacher, weights=answers.teacher_weights, classes=text)
    known, wanted = read_class_list(config), num_teacher_classes(answers)
    if len(known) != wanted:
        raise RecipeError(f"{text[:80]!r} has {len(known):,} classes, and the weights {wanted:,}.")
    rows_of_classes(data_classes(answers), known, text, "classes")
    return text
