"""Describe the losses for `kdpipe losses`: what each minimizes, requires of the teacher, and takes as keys.

Everything is read from the configuration classes: texts from their docstrings, types and defaults from pydantic.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import LogitLoss, Loss
from kdpipe.stages.losses.registry import LOSSES, loss_class
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.plugins.user_code import is_user_reference
from kdpipe.store.errors import did_you_mean

EVERY_ENTRY, ON_LOGITS = "every entry", "losses on logits"


@dataclass(frozen=True)
class Key:
    """A key of an entry.

    Attributes:
        name: Dotted for keys of a nested section, as `--set` takes them.
        text: The description.
        type: The accepted values, in words.
        default: None if it is not set, or if the key is required.
        shared_by: Which other losses have the key; None if it is the loss's own.
    """

    name: str
    text: str
    type: str
    default: Any
    required: bool
    shared_by: str | None

    @property
    def default_text(self) -> str:
        """Return the default as a recipe would write it."""
        if self.required:
            return "required"
        return "not set" if self.default is None else json.dumps(self.default, default=str)


@dataclass(frozen=True)
class LossDescription:
    """Description of a loss; its properties are those of `Loss`.

    Attributes:
        module: Where a user's loss comes from; None for those of kdpipe.
    """

    name: str
    module: str | None
    description: str
    paper: str
    requires: str
    per_sample: bool
    one_label: bool
    whole_logits: bool
    input_gradient: bool
    keys: tuple[Key, ...]

    @property
    def summary(self) -> str:
        """Return the first line of the description."""
        return self.description.partition("\n")[0]

    @property
    def origin(self) -> str:
        """Return the paper, of a user's loss its module as well."""
        return ", ".join(filter(None, [self.paper, self.module and f"from {self.module}"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_losses() -> list[LossDescription]:
    """Return descriptions of all losses."""
    return [_describe(loss_class(name)) for name in LOSSES.names()]


def find_loss(name: str) -> LossDescription:
    """Return the description of a loss, or of that which a `python:` reference names.

    Raises:
        RecipeError: There is no such loss; the message has the nearest names.
    """
    names = LOSSES.names()
    if name not in names and not is_user_reference(name):
        raise RecipeError(f"unknown loss {name[:80]!r}; {did_you_mean(name, names, limit=3)}")
    return _describe(loss_class(name))


def description_of(section: type[Any]) -> str:
    """Return the docstring of a recipe section without its "Attributes:"."""
    return inspect.cleandoc(section.__doc__ or "").partition("\n\nAttributes:")[0]


def attributes_of(section: type[Any]) -> dict[str, str]:
    """Return the descriptions of a section's keys by name, from its docstring and those of its base classes."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        block = inspect.cleandoc(vars(base).get("__doc__") or "").partition("\n\nAttributes:\n")[2]
        for entry in re.split(r"\n    (?! )", "\n" + block)[1:]:
            name, _, text = entry.partition(":")
            texts[name] = " ".join(text.split())
    return texts


def _describe(config: type[Loss]) -> LossDescription:
    schema = TypeAdapter(config).json_schema()
    samples = schema["$defs"]["SampleSelection"]
    del schema["properties"]["loss"]
    return LossDescription(
        name=config.loss,
        module=_module_of(config),
        description=description_of(config),
        paper=config.paper,
        requires=config.requires,
        per_sample=config.per_sample,
        one_label=config.one_label,
        whole_logits=config.whole_logits,
        input_gradient=config.input_gradient,
        keys=(*_keys(schema, attributes_of(config)), *_keys(samples, attributes_of(SampleSelection), "samples.")),
    )


def _module_of(config: type[Loss]) -> str | None:
    if is_user_reference(config.loss):
        return config.loss.split(":")[1]
    return None if config.__module__.partition(".")[0] == "kdpipe" else config.__module__


def _keys(schema: Mapping[str, Any], texts: Mapping[str, str], prefix: str = "") -> Iterator[Key]:
    for name, value in schema["properties"].items():
        if name != "samples":
            required = name in schema.get("required", ())
            shared_by = _shared_by(prefix.rstrip(".") or name)
            yield Key(
                prefix + name, texts.get(name, ""), type_in_words(value), value.get("default"), required, shared_by
            )


def _shared_by(name: str) -> str | None:
    for losses, section in ((EVERY_ENTRY, Loss), (ON_LOGITS, LogitLoss)):
        if name in {field.name for field in fields(section)}:
            return losses
    return None


TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false", "object": "table"}

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def type_in_words(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in words, such as "number >= 0 or schedule" or "list of [text, text], 1 or more"."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2].lower()
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(type_in_words, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        least = f", {schema['minItems']} or more" if "minItems" in schema else ""
        return f"list of {type_in_words(schema.get('items', {}))}{least}"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema]
    return f"{TYPES.get(schema.get('type', ''), 'value')} {' and '.join(bounds)}".strip()
