"""What losses there are, read off the sections of their entries: what each minimises, needs of the teacher, and takes.

Nothing here knows a loss by name: keys and types come from the section's fields, what is stored from what an example of
it wants of a layer.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from stages.errors import RecipeError
from stages.forms import ATTENTION, INPUT_GRADIENT, MAP, POOLED, SPATIAL_GRAM, Wanted
from stages.losses.entry import Entry, Response
from stages.losses.terms import LOSSES
from stages.schedules import Ramp

LOGITS = "logits"

FORM_TEXTS = {
    LOGITS: "logits",
    MAP: "map [C, H, W] of each layer",
    POOLED: "pooled vector [C] of each layer",
    ATTENTION: "attention map [H, W] of each layer",
    "gram": "Gram matrix of channels [C, C] of each layer",
    SPATIAL_GRAM: "Gram matrix of positions [HW, HW] of each layer",
    INPUT_GRADIENT: "input gradient's attention map [H, W]",
}
"""What a store keeps of the teacher, in words, by form."""

STUDENT_MAPS = {"small": (64, 8, 8), "large": (64, 56, 56)}
"""Example layers of a student, for which a loss may want different forms of the teacher's."""

EVERY_ENTRY, ON_LOGITS = "every entry", "losses on logits"


@dataclass(frozen=True)
class Key:
    """A key of an entry. type: in words. default: None where it is not set, and where it is `required`. shared_by:
    which other losses have it too; None where it is the loss's own.
    """

    name: str
    type: str
    default: Any
    required: bool
    shared_by: str | None


@dataclass(frozen=True)
class Stored:
    """What is needed of the teacher in a store. form: as in `cache.layers`, or "logits". of: of which of the student's
    layers, those with "small" or "large" maps, or "any". to_students_size: whether larger maps are pooled first.
    """

    form: str
    text: str
    of: str
    to_students_size: bool


@dataclass(frozen=True)
class Loss:
    """What `kdpipe losses` says of a loss. minimised: the first line of description. per_sample: whether samples can be
    weighed one by one; else it is about the batch. num_others, whole_logits, one_label, input_gradient: as in `Entry`.
    reads_others: whether what the teacher says of the others is read too, at the default keys.
    """

    name: str
    minimised: str
    description: str
    paper: str
    stored: tuple[Stored, ...]
    per_sample: bool
    one_label: bool
    whole_logits: bool
    input_gradient: bool
    num_others: int
    reads_others: bool
    keys: tuple[Key, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_losses() -> list[Loss]:
    """All losses, in the order in which the recipe's schema has them."""
    return [_loss(kind) for kind in LOSSES]


def find_loss(name: str) -> Loss:
    """The loss called `name`. Raises RecipeError, with the names that are near, where there is none."""
    losses = {loss.name: loss for loss in list_losses()}
    if name in losses:
        return losses[name]
    near = get_close_matches(name.lower(), losses, 3, 0.5)
    hint = f"nearest: {', '.join(near)}." if near else f"known are {', '.join(losses)}."
    raise RecipeError(f"no loss is called {name[:80]!r}: {hint}")


def spelled(default: Any) -> str:
    """A default as a recipe would write it; "not set" for None."""
    return "not set" if default is None else json.dumps(default)


def _loss(kind: type[Entry]) -> Loss:
    description = inspect.cleandoc(kind.__doc__ or "")
    example = _example(kind)
    return Loss(
        name=example.loss,
        minimised=description.partition("\n")[0],
        description=description,
        paper=kind.paper,
        stored=tuple(_stored(example)),
        per_sample=kind.per_sample,
        one_label=kind.one_label,
        whole_logits=kind.whole_logits,
        input_gradient=kind.input_gradient,
        num_others=example.num_others,
        reads_others=bool(example.wanted_of_others),
        keys=tuple(_keys(kind)),
    )


def _example(kind: type[Entry]) -> Entry:
    """An entry with all defaults, at one pair of layers where it takes layers."""
    hints = _hints(kind)
    layers: dict[str, Any] = {"layers": (("student", "teacher"),)} if "layers" in hints else {}
    return kind(loss=get_args(hints["loss"])[0], **layers)


def _stored(example: Entry) -> Iterator[Stored]:
    if example.on_logits:
        yield Stored(LOGITS, FORM_TEXTS[LOGITS], "any", False)
    wanted = {size: [_form(one) for one in example.wants({"student": shape})] for size, shape in STUDENT_MAPS.items()}
    alike = wanted["small"] == wanted["large"]
    for of, forms in {"any": wanted["small"]}.items() if alike else wanted.items():
        for form, to_students_size in forms:
            yield Stored(form, FORM_TEXTS[form], of, to_students_size)


def _form(wanted: Wanted) -> tuple[str, bool]:
    return wanted.form, wanted.size is not None


def _keys(kind: type[Any], prefix: str = "") -> Iterator[Key]:
    """The keys of a section; those of a section inside it by their path, as `--set` takes them."""
    hints = _hints(kind)
    for field in fields(kind):
        if field.name == "loss":
            continue
        if is_dataclass(hints[field.name]):
            yield from _keys(typing.cast("type[Any]", hints[field.name]), f"{prefix}{field.name}.")
            continue
        default = _default(field)
        required = default is MISSING
        name = prefix + field.name
        yield Key(name, in_words(hints[field.name]), None if required else default, required, _shared_by(name))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shared_by(name: str) -> str | None:
    first = name.partition(".")[0]
    for whose, section in ((EVERY_ENTRY, Entry), (ON_LOGITS, Response)):
        if first in {field.name for field in fields(section)}:
            return whose
    return None


def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


WORDS = {float: "number", int: "whole number", str: "text", bool: "true or false", Ramp: "ramp"}

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def in_words(hint: Any) -> str:
    """What a key takes, for people: "number >= 0 or ramp", "list of [text, text], 1 or more"."""
    inner, bounds = _unwrapped(hint)
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        return _either([json.dumps(argument) for argument in arguments])
    if origin in (Union, UnionType):
        return _either([in_words(argument) for argument in arguments if argument is not type(None)])
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {in_words(arguments[0])}{_length(bounds)}"
    if origin is tuple:
        return f"[{', '.join(map(in_words, arguments))}]"
    limits = [f"{sign} {bounds[name]:g}" for name, sign in SIGNS.items() if name in bounds]
    return f"{WORDS.get(inner, getattr(inner, '__name__', str(inner)))} {' and '.join(limits)}".strip()


def _unwrapped(hint: Any) -> tuple[Any, dict[str, Any]]:
    """The type itself, and the bounds that pydantic's annotations set it: ge, gt, le, lt, min_length, max_length."""
    if get_origin(hint) is not Annotated:
        return hint, {}
    inner, *notes = get_args(hint)
    marks = [mark for note in notes for mark in getattr(note, "metadata", ())]
    names = (*SIGNS, "min_length", "max_length")
    return inner, {name: getattr(mark, name) for mark in marks for name in names if hasattr(mark, name)}


def _length(bounds: dict[str, Any]) -> str:
    least, most = bounds.get("min_length", 0), bounds.get("max_length")
    if least == most:
        return f", just {least}"
    return f", {least} or more" if least else ""


def _either(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
