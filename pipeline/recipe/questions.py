"""The questions of `kdpipe recipe new`, with their defaults and the parsing of their answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdpipe.pipeline.recipe.dry_build import KINDS, NUM_CLASSES, SHAPES
from kdpipe.pipeline.recipe.template import FEATURE_LOSSES, OFFERED_LOSSES, TRAINED_HERE, Answers, is_small_network
from kdpipe.stages.config import PathStr
from kdpipe.stages.data.load import KNOWN_NAMES
from kdpipe.stages.data.sources.user_function import is_user_dataset
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.build import PUBLISHED, TORCHVISION, ModelConfig, build_model, list_models
from kdpipe.store.errors import did_you_mean

Parser = Callable[[str, Answers], Any]
"""Returns the value of an answer, given the answers before it, or raises RecipeError."""


@dataclass(frozen=True)
class Question:
    """A question, asked after those before it in `QUESTIONS` were answered.

    Attributes:
        key: The field of `Answers`.
        default: Returns the answer that Enter accepts; None if there is no default.
        applies: Returns whether the question makes a difference.
    """

    key: str
    text: str
    default: Callable[[Answers], str | None]
    parse: Parser
    applies: Callable[[Answers], bool] = lambda answers: True

    @property
    def option(self) -> str:
        """The command line option that answers the question."""
        return "--loss" if self.key == "losses" else f"--{self.key.replace('_', '-')}"


def _typed(kind: Any) -> Parser:
    """Return a parser of values that pydantic accepts for the type `kind`."""
    adapter = TypeAdapter(kind)

    def parse(text: str, answers: Answers) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"invalid value {text[:80]!r}: {message[0].lower()}{message[1:]}.") from error

    return parse


_path = _typed(PathStr)


def _data(text: str, answers: Answers) -> str:
    kind, colon, path = text.partition(":")
    kind = {name.lower(): name for name in KINDS}.get(kind.lower(), kind)
    needs_path = kind in ("imagefolder", "npz", "python")
    if is_user_dataset(text) and not needs_path:
        return text
    if kind not in KINDS or needs_path != bool(colon and path):
        raise RecipeError(f"unknown data set {text[:80]!r}; choose from {', '.join(KNOWN_NAMES)}.")
    return str(_path(kind + colon + path, answers))


def _model(text: str, answers: Answers) -> str:
    if is_small_network(text):
        return str(_path(text, answers))
    known = list_models()
    if text in known or (text.startswith(TORCHVISION) and text.removeprefix(TORCHVISION) in known):
        return text
    hint = did_you_mean(text, known, limit=3, otherwise="name your own network as python:package.module:factory.")
    raise RecipeError(f"unknown model {text[:80]!r}; {hint}")


def _losses(text: str, answers: Answers) -> tuple[str, ...]:
    losses = tuple(dict.fromkeys(re.split(r"[\s,+]+", text.strip())))
    unknown = [loss for loss in losses if loss not in OFFERED_LOSSES]
    if unknown:
        raise RecipeError(f"choose losses from {', '.join(OFFERED_LOSSES)}, not {', '.join(unknown)}; others: later.")
    return losses


def _layers(text: str, answers: Answers) -> tuple[str, str]:
    pair = [word.strip() for word in text.split(",")]
    if len(pair) != 2 or not all(pair):
        raise RecipeError(f"{text[:80]!r} is not a pair of modules STUDENT,TEACHER, such as layer3,layer3.")
    return str(_path(pair[0], answers)), str(_path(pair[1], answers))


def _default_name(answers: Answers) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(answers.file).stem).strip("-_.")[:100] or "first"


def _default_weights(answers: Answers) -> str:
    return TRAINED_HERE if is_small_network(answers.teacher) else PUBLISHED


def _default_layers(answers: Answers) -> str | None:
    pair = _last_map(answers.student, answers), _last_map(answers.teacher, answers)
    return f"{pair[0]},{pair[1]}" if pair[0] and pair[1] else None


def _last_map(name: str, answers: Answers) -> str | None:
    """Return the path of the last module that outputs a feature map, by the usual names of stages."""
    _, channels, side = SHAPES.get(answers.data, (NUM_CLASSES, 3, None))
    side = answers.image_size or side or 64
    channels = answers.channels or channels or 3
    config = ModelConfig(name=name)
    try:
        model = build_model(config, num_classes=NUM_CLASSES, in_channels=channels, image_size=(side, side), seed=0)
    except (ModelError, RecipeError):
        return None
    stages = [path for path, _ in model.named_children() if re.match(r"stage|layer|block|features", path)]
    return stages[-1] if stages else None


QUESTIONS = (
    Question(
        "name",
        "Name of the experiment",
        _default_name,
        _typed(Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$")]),
    ),
    Question("data", f"Data set ({', '.join(KNOWN_NAMES)})", lambda _: "digits", _data),
    Question("root", "Folder of the data", lambda _: "data", _path, lambda answers: answers.data != "digits"),
    Question(
        "image_size",
        "Side of the images in pixels, to which they are cropped and resized",
        lambda _: "224",
        _typed(Annotated[int, Field(ge=8, le=2**14)]),
        lambda answers: answers.kind == "imagefolder",
    ),
    Question("teacher", "Network of the teacher", lambda answers: answers.defaults.teacher, _model),
    Question(
        "teacher_weights",
        "Weights of the teacher (train: train it here; published: torchvision's; or a .safetensors or state dict file)",
        _default_weights,
        _path,
    ),
    Question("student", "Network of the student", lambda answers: answers.defaults.student, _model),
    Question("losses", f"Losses, one or several ({', '.join(OFFERED_LOSSES)})", lambda _: "kd", _losses),
    Question(
        "layers",
        "Modules that the losses on features compare: STUDENT,TEACHER",
        _default_layers,
        _layers,
        lambda answers: any(loss in FEATURE_LOSSES for loss in answers.losses),
    ),
    Question(
        "seeds",
        "Number of seeds, each with a student alone and a distilled one",
        lambda _: "3",
        _typed(Annotated[int, Field(ge=1, le=100)]),
    ),
    Question("compress", "Prune, quantize and export the students (yes, no)", lambda _: "yes", _typed(bool)),
    Question(
        "prune_ratio",
        "Fraction of the channels to prune (0: quantize only)",
        lambda _: "0.25",
        _typed(Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]),
        lambda answers: answers.compress,
    ),
)
