"""The questions of `kdpipe recipe new`, with their defaults and the parsing of their answers.

What needs torch is imported where an answer needs it: the first question comes at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdpipe.pipeline.recipe.present import (
    is_stated,
    modules_of,
    require_data,
    require_factory,
    require_module,
    require_weights_file,
    scaling_named,
)
from kdpipe.pipeline.recipe.teacher_classes import (
    classes_named,
    default_classes,
    has_other_classes,
    num_data_classes,
    num_teacher_classes,
)
from kdpipe.pipeline.recipe.template import (
    FEATURE_LOSSES,
    OFFERED_LOSSES,
    PUBLISHED,
    STATED,
    TRAINED_HERE,
    Answers,
    is_small_network,
)
from kdpipe.stages.config import PathStr
from kdpipe.stages.data.names import FILE_KINDS, KINDS, KNOWN_NAMES
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.faults import fault_sentence
from kdpipe.store.errors import did_you_mean

FEW_MODULES = 4
"""With fewer modules at the top of a network, those below are shown too."""

Parser = Callable[[str, Answers], Any]
"""Returns the value of an answer, given the answers before it, or raises RecipeError."""


@dataclass(frozen=True)
class Question:
    """A question, asked after those before it in `QUESTIONS` were answered.

    Attributes:
        key: The field of `Answers`.
        default: Returns the answer that Enter accepts; None if there is no default.
        applies: Returns whether the question makes a difference.
        hints: Returns lines to print before the question.
    """

    key: str
    text: str
    default: Callable[[Answers], str | None]
    parse: Parser
    applies: Callable[[Answers], bool] = lambda answers: True
    hints: Callable[[Answers], Sequence[str]] = lambda answers: ()

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
            raise RecipeError(f"invalid value {text[:80]!r}: {fault_sentence(error.errors()[0])}.") from error

    return parse


_path = _typed(PathStr)


def _data(text: str, answers: Answers) -> str:
    kind, colon, path = text.partition(":")
    kind = {name.lower(): name for name in KINDS}.get(kind.lower(), kind)
    needs_path = kind in (*FILE_KINDS, "npz", "python")
    if kind in KINDS and needs_path == bool(colon and path):
        require_factory(text, "data.name")
        return str(_path(kind + colon + path, answers))
    from kdpipe.stages.data.sources.user_function import is_user_dataset

    if not needs_path and is_user_dataset(text):
        return text
    raise RecipeError(f"unknown data set {text[:80]!r}; choose from {', '.join(KNOWN_NAMES)}.")


def _root(text: str, answers: Answers) -> str:
    root = str(_path(text, answers))
    require_data(answers, root)
    return root


def _weights(text: str, answers: Answers) -> str:
    weights = str(_path(text, answers))
    require_weights_file(weights)
    return weights


def _model(text: str, answers: Answers) -> str:
    from kdpipe.stages.models.build import TORCHVISION, list_models
    from kdpipe.stages.models.libraries.by_name import prefix_of

    if is_small_network(text):
        require_factory(text, "model.name")
        return str(_path(text, answers))
    if prefix_of(text):
        return text
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
    student, teacher = (str(_path(word, answers)) for word in pair)
    require_module("student", answers.student, student, answers)
    require_module("teacher", answers.teacher, teacher, answers)
    return student, teacher


def _default_name(answers: Answers) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(answers.file).stem).strip("-_.")[:100] or "first"


def _default_weights(answers: Answers) -> str:
    return TRAINED_HERE if is_small_network(answers.teacher) else PUBLISHED


def _default_layers(answers: Answers) -> str | None:
    pair = _last_map(answers.student, answers), _last_map(answers.teacher, answers)
    return f"{pair[0]},{pair[1]}" if pair[0] and pair[1] else None


def _last_map(name: str, answers: Answers) -> str | None:
    """Return the path of the last module that outputs a feature map, by the usual names of stages."""
    paths = [one.path for one in modules_of(name, answers)]
    return next((path for path in paths[::-1] if re.fullmatch(r"(stage|layer|block|features)\w*", path)), None)


def _module_lines(answers: Answers) -> Sequence[str]:
    """Return the outer modules of student and teacher with the shapes of their outputs."""
    lines = []
    for role, name in (("student", answers.student), ("teacher", answers.teacher)):
        found = modules_of(name, answers)
        top = [one for one in found if "." not in one.path]
        outer = top if len(top) >= FEW_MODULES else [one for one in found if one.path.count(".") < 2]
        shown = ", ".join(f"{one.path} ({' x '.join(map(str, one.shape))})" for one in outer)
        lines.append(f"modules of the {role}: {shown or 'not known before the data is read'}")
    return [*lines, "(`kdpipe modules RECIPE` lists those inside too)"]


def _class_lines(answers: Answers) -> Sequence[str]:
    return [
        f"the weights tell {num_teacher_classes(answers):,} classes apart, the data has {num_data_classes(answers):,}"
    ]


def _is_given(answers: Answers) -> bool:
    return answers.teacher_weights not in (TRAINED_HERE, PUBLISHED)


QUESTIONS = (
    Question(
        "name",
        "Name of the experiment",
        _default_name,
        _typed(Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$")]),
    ),
    Question("data", f"Data set ({', '.join(KNOWN_NAMES)})", lambda _: "digits", _data),
    Question("root", "Folder of the data", lambda _: "data", _root, lambda answers: answers.data != "digits"),
    Question(
        "image_size",
        "Side of the images in pixels, to which they are cropped and resized",
        lambda _: "224",
        _typed(Annotated[int, Field(ge=8, le=2**14)]),
        lambda answers: answers.kind in FILE_KINDS,
    ),
    Question("teacher", "Network of the teacher", lambda answers: answers.defaults.teacher, _model),
    Question(
        "teacher_weights",
        "Weights of the teacher (train: train it here; published: torchvision's; or a .safetensors or state dict file)",
        _default_weights,
        _weights,
    ),
    Question(
        "classes",
        "Names of its weights' classes, of which the data's are kept (published: as its library names them; or a file "
        "with one a line; none: a new last layer is trained)",
        default_classes,
        classes_named,
        has_other_classes,
        _class_lines,
    ),
    Question(
        "normalization",
        "Input scaling that the teacher was trained with (imagenet, cifar10, cifar100, mnist, or MEAN/STD, of pixels "
        "in [0, 1])",
        lambda answers: STATED if is_stated(answers) else None,
        scaling_named,
        _is_given,
    ),
    Question("student", "Network of the student", lambda answers: answers.defaults.student, _model),
    Question("losses", f"Losses, one or several ({', '.join(OFFERED_LOSSES)})", lambda _: "kd", _losses),
    Question(
        "layers",
        "Modules that the losses on features compare: STUDENT,TEACHER",
        _default_layers,
        _layers,
        lambda answers: any(loss in FEATURE_LOSSES for loss in answers.losses),
        _module_lines,
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
