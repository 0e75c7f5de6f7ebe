"""Build the JSON Schema (2020-12) of recipes, by which editors complete and check keys."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.stages.losses.registry import LOSSES

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """Return the schema: every key with its type, bounds, default and description."""
    schema = TypeAdapter(Recipe).json_schema()
    sections = {kind.__name__: kind for kind in recipe_sections()}
    for name, definition in (*schema["$defs"].items(), (Recipe.__name__, schema)):
        if name in sections:
            _explain(definition, sections[name])
    _without_null(schema)
    for definition in (*schema["$defs"].values(), schema):
        _explain_sections(definition, schema["$defs"])
    for listed in _lists_of_losses(schema):
        listed["items"] = _items_of_losses(listed["items"])
    schema["properties"]["compare"]["additionalProperties"] = False
    schema["properties"]["compare"]["description"] = (
        "Variants of the training to compare on the same student, by name, for `kdpipe compare`."
    )
    return {"$schema": DIALECT, **schema, "title": "kdpipe recipe"}


def recipe_sections() -> list[type]:
    """Return the dataclasses of the recipe and of all sections in it, each once."""
    found: list[type] = []
    waiting: list[Any] = [Recipe]
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, type) and is_dataclass(kind):
            if kind not in found:
                found.append(kind)
                waiting += inspect.get_annotations(kind, eval_str=True).values()
                waiting += [hint for base in kind.__mro__[1:] for hint in _annotations(base)]
        else:
            waiting += get_args(kind)
    return found


def explanations(kind: type) -> dict[str, str]:
    """Return the descriptions of a section's keys, from its docstring and those of its bases.

    A description is an entry of `Attributes:`, or a sentence that begins with `key: ` or `key, key: `; it ends at the
    next one, or with the paragraph.
    """
    names = "|".join(sorted((re.escape(field.name) for field in fields(kind)), key=len, reverse=True))
    heads = re.compile(rf"(?:^ *|(?<=[.)] ))((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    found: dict[str, str] = {}
    for base in kind.__mro__:
        doc = "\n".join(line.strip() for line in (base.__dict__.get("__doc__") or "").splitlines())
        for paragraph in doc.split("\n\n"):
            pieces = heads.split(paragraph)
            for keys, text in zip(pieces[1::2], pieces[2::2], strict=True):
                for key in keys.split(", "):
                    found.setdefault(key, _sentence(text))
    return found


def _annotations(base: type) -> list[Any]:
    return list(inspect.get_annotations(base, eval_str=True).values()) if is_dataclass(base) else []


def _sentence(text: str) -> str:
    plain = " ".join(text.split())
    return plain[0].upper() + plain[1:]


def _explain(definition: dict[str, Any], kind: type) -> None:
    """Replace the docstring and pydantic's titles in a definition by a description of each key."""
    descriptions = explanations(kind)
    opening = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    definition["description"] = _sentence(opening)
    for field in fields(kind):
        key = definition["properties"][field.name]
        key.pop("title", None)
        if field.name in descriptions:
            key["description"] = descriptions[field.name]
        if (default := _own_default(field)) is not None:
            key["default"] = default


def _explain_sections(definition: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Give keys without a description that of the section they hold."""
    for key in definition["properties"].values():
        if "$ref" in key and "description" not in key:
            key["description"] = sections[key["$ref"].rpartition("/")[2]]["description"]


def _own_default(field: Any) -> dict[str, Any] | None:
    """Return the defaults of a section that differ from those of its keys; None if there are none."""
    make = getattr(field.default, "default_factory", None)  # pydantic's Field is the default
    made = make() if make else None
    if not is_dataclass(made) or isinstance(made, type):
        return None
    plain = asdict(type(made)())
    return {key: value for key, value in asdict(made).items() if plain[key] != value} or None


def _without_null(schema: Any) -> None:
    """Remove null from the types, in place: TOML has none; leaving a key out means the same."""
    if isinstance(schema, list):
        for entry in schema:
            _without_null(entry)
    if not isinstance(schema, dict):
        return
    if "anyOf" in schema:
        options = [option for option in schema.pop("anyOf") if option != {"type": "null"}]
        schema.update(options[0] if len(options) == 1 else {"anyOf": options})
    if "default" in schema and schema["default"] is None:
        del schema["default"]
    for entry in schema.values():
        _without_null(entry)


def _lists_of_losses(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema["properties"]["distill"]
    yield schema["$defs"]["CompareEntry"]["properties"]["distill"]


def _items_of_losses(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an entry, with the names of losses first, by which editors complete it."""
    names = [str(get_args(inspect.get_annotations(kind, eval_str=True)["loss"])[0]) for kind in LOSSES]
    named = {
        "enum": names,
        "description": "Name of the loss: `kdpipe losses` lists them, `kdpipe losses NAME` explains one.",
    }
    return {"type": "object", "required": ["loss"], "properties": {"loss": named}, "oneOf": items["oneOf"]}
