"""Describe the losses for `kdpipe losses`: what each minimizes, requires of the teacher, and takes as keys.

Everything is read from the losses' configurations: keys and types from their fields, texts from their docstrings, and
stored features from an example.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import LogitLossConfig, LossConfig
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.losses.schedules import Schedule
from kdpipe.stages.targets.feature_spec import ATTENTION, INPUT_GRADIENT, MAP, POOLED, SPATIAL_GRAM
from kdpipe.stages.targets.resolve import LOGITS
from kdpipe.store.errors import did_you_mean

STATISTIC_TEXTS = {
    LOGITS: "logits",
    MAP: "map [C, H, W] of each layer",
    POOLED: "pooled vector [C] of each layer",
    ATTENTION: "attention map [H, W] of each layer",
    "gram": "Gram matrix of channels [C, C] of each layer",
    SPATIAL_GRAM: "Gram matrix of positions [HW, HW] of each layer",
    INPUT_GRADIENT: "input gradient's attention map [H, W]",
}
"""Descriptions of the statistics that a store can hold."""

STUDENT_MAPS = {"small": (64, 8, 8), "large": (64, 56, 56)}
"""Example shapes of a student's layer, for which a loss may require different statistics of the teacher's."""

EVERY_ENTRY, ON_LOGITS = "every entry", "losses on logits"


@dataclass(frozen=True)
class Key:
    """A key of an entry.

    Attributes:
        name: Dotted for keys of a nested section, as `--set` takes them.
        text: The description.
        type: The accepted values, in words.
        default: None if it is not set, or if the key is required.
        required: Whether there is no default.
        shared_by: Which other losses have the key; None if it is the loss's own.
    """

    name: str
    text: str
    type: str
    default: Any
    required: bool
    shared_by: str | None


@dataclass(frozen=True)
class Stored:
    """A feature of the teacher that a loss requires in the store.

    Attributes:
        form: The statistic, as in `cache.layers`, or "logits".
        text: Its description.
        of: The student's layers that it is for: those with "small" or "large" maps, or "any".
        to_students_size: Whether maps larger than the student's are pooled first.
    """

    statistic: str
    text: str
    of: str
    to_students_size: bool


@dataclass(frozen=True)
class Loss:
    """Description of a loss; its properties are those of `LossConfig`.

    Attributes:
        summary: The first line of the description.
        reads_negatives: Whether the teacher's features of the negatives are read, at the default keys.
    """

    name: str
    summary: str
    description: str
    paper: str
    stored: tuple[Stored, ...]
    per_sample: bool
    one_label: bool
    whole_logits: bool
    input_gradient: bool
    num_negatives: int
    reads_negatives: bool
    keys: tuple[Key, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_losses() -> list[Loss]:
    """Return descriptions of all losses."""
    return [_describe(kind) for kind in LOSSES]


def find_loss(name: str) -> Loss:
    """Return the description of a loss.

    Raises:
        RecipeError: There is no such loss; the message has the nearest names.
    """
    losses = {loss.name: loss for loss in list_losses()}
    if name in losses:
        return losses[name]
    raise RecipeError(f"unknown loss {name[:80]!r}; {did_you_mean(name, losses, limit=3)}")


def format_default(default: Any) -> str:
    """Return a default as a recipe would write it; "not set" for None."""
    return "not set" if default is None else json.dumps(default)


def description_of(kind: type[Any]) -> str:
    """Return the docstring of a recipe section without its "Attributes:"."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]


def attributes_of(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions of a section's keys by name, from its docstring and those of its base classes."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        block = inspect.cleandoc(vars(base).get("__doc__") or "").partition("\n\nAttributes:\n")[2]
        for entry in re.split(r"\n    (?! )", "\n" + block)[1:]:
            name, _, text = entry.partition(":")
            texts[name] = " ".join(text.split())
    return texts


def _describe(kind: type[LossConfig]) -> Loss:
    description = description_of(kind)
    example = _example(kind)
    return Loss(
        name=example.loss,
        summary=description.partition("\n")[0],
        description=description,
        paper=kind.paper,
        stored=tuple(_stored(example)),
        per_sample=kind.per_sample,
        one_label=kind.one_label,
        whole_logits=kind.whole_logits,
        input_gradient=kind.input_gradient,
        num_negatives=example.num_negatives,
        reads_negatives=bool(example.negative_features),
        keys=tuple(_keys(kind)),
    )


def _example(kind: type[LossConfig]) -> LossConfig:
    """Return an entry with all defaults, with one pair of layers if it takes layers."""
    hints = _hints(kind)
    layers: dict[str, Any] = {"layers": (("student", "teacher"),)} if "layers" in hints else {}
    return kind(loss=get_args(hints["loss"])[0], **layers)


def _stored(example: LossConfig) -> Iterator[Stored]:
    if example.on_logits:
        yield Stored(LOGITS, STATISTIC_TEXTS[LOGITS], "any", False)
    required = {
        size: [
            (feature.statistic, feature.size is not None) for feature in example.required_features({"student": shape})
        ]
        for size, shape in STUDENT_MAPS.items()
    }
    if required["small"] == required["large"]:
        required = {"any": required["small"]}
    for of, features in required.items():
        for form, to_students_size in features:
            yield Stored(form, STATISTIC_TEXTS[form], of, to_students_size)


def _keys(kind: type[Any], prefix: str = "") -> Iterator[Key]:
    hints, texts = _hints(kind), attributes_of(kind)
    for field in fields(kind):
        if field.name == "loss":
            continue
        if is_dataclass(hints[field.name]):
            yield from _keys(typing.cast("type[Any]", hints[field.name]), f"{prefix}{field.name}.")
            continue
        default = _default(field)
        required = default is MISSING
        name = prefix + field.name
        value_type = type_in_words(hints[field.name])
        yield Key(name, texts[field.name], value_type, None if required else default, required, _shared_by(name))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shared_by(name: str) -> str | None:
    first = name.partition(".")[0]
    for losses, section in ((EVERY_ENTRY, LossConfig), (ON_LOGITS, LogitLossConfig)):
        if first in {field.name for field in fields(section)}:
            return losses
    return None


def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


TYPE_NAMES = {float: "number", int: "whole number", str: "text", bool: "true or false", Schedule: "ramp"}

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def type_in_words(hint: Any) -> str:
    """Return a type hint in words, such as "number >= 0 or ramp" or "list of [text, text], 1 or more"."""
    inner, bounds = _unwrapped(hint)
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        return _either([json.dumps(argument) for argument in arguments])
    if origin in (Union, UnionType):
        return _either([type_in_words(argument) for argument in arguments if argument is not type(None)])
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {type_in_words(arguments[0])}{_length(bounds)}"
    if origin is tuple:
        return f"[{', '.join(map(type_in_words, arguments))}]"
    limits = [f"{sign} {bounds[name]:g}" for name, sign in SIGNS.items() if name in bounds]
    return f"{TYPE_NAMES.get(inner, getattr(inner, '__name__', str(inner)))} {' and '.join(limits)}".strip()


def _unwrapped(hint: Any) -> tuple[Any, dict[str, Any]]:
    """Return the type without its annotations, and pydantic's bounds: ge, gt, le, lt, min_length, max_length."""
    if get_origin(hint) is not Annotated:
        return hint, {}
    inner, *notes = get_args(hint)
    marks = [mark for note in notes for mark in getattr(note, "metadata", ())]
    names = (*SIGNS, "min_length", "max_length")
    return inner, {name: getattr(mark, name) for mark in marks for name in names if hasattr(mark, name)}


def _length(bounds: dict[str, Any]) -> str:
    lowest, highest = bounds.get("min_length", 0), bounds.get("max_length")
    if lowest == highest:
        return f", exactly {lowest}"
    return f", {lowest} or more" if lowest else ""


def _either(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
