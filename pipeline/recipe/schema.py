"""The JSON Schema (2020-12) of recipes, for editors: every key with its type, default and what it is for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter

from pipeline.recipe.load import Recipe
from stages.losses.terms import LOSSES

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """The schema as JSON: `load_recipe` takes nothing that it refuses, but for values that only reading can judge."""
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
    schema["properties"]["compare"]["description"] = "Ways of teaching the same student, by name, for `kdpipe compare`."
    return {"$schema": DIALECT, **schema, "title": "A recipe of kdpipe"}


def recipe_sections() -> list[type]:
    """The recipe's section and all sections in it, each once."""
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
    """What the docstrings of a section, and of those that it is made of, say of its keys: `key: text`, or of several
    `key, key: text`, up to the next one or the paragraph's end.
    """
    names = "|".join(sorted((re.escape(field.name) for field in fields(kind)), key=len, reverse=True))
    heads = re.compile(rf"(?:^ *|(?<=[.)] ))((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    found: dict[str, str] = {}
    for base in kind.__mro__:
        for paragraph in inspect.cleandoc(base.__dict__.get("__doc__") or "").split("\n\n"):
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
    """Put what docstrings say beside the keys, in the place of the whole docstring and of pydantic's titles."""
    said = explanations(kind)
    opening = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    definition["description"] = _sentence(opening)
    for field in fields(kind):
        key = definition["properties"][field.name]
        key.pop("title", None)
        if field.name in said:
            key["description"] = said[field.name]
        if (default := _own_default(field)) is not None:
            key["default"] = default


def _explain_sections(definition: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """A key of which nothing is said, and at which a section stands, is what the section says of itself."""
    for key in definition["properties"].values():
        if "$ref" in key and "description" not in key:
            key["description"] = sections[key["$ref"].rpartition("/")[2]]["description"]


def _own_default(field: Any) -> dict[str, Any] | None:
    """What a section has by default otherwise than its keys say by themselves; None for nothing."""
    make = getattr(field.default, "default_factory", None)  # pydantic's Field stands in the place of a default
    made = make() if make else None
    if not is_dataclass(made) or isinstance(made, type):
        return None
    plain = asdict(type(made)())
    return {key: value for key, value in asdict(made).items() if plain[key] != value} or None


def _without_null(schema: Any) -> None:
    """Take null out: TOML has none, and a key that is left out means it."""
    if isinstance(schema, list):
        for one in schema:
            _without_null(one)
    if not isinstance(schema, dict):
        return
    if "anyOf" in schema:
        options = [option for option in schema.pop("anyOf") if option != {"type": "null"}]
        schema.update(options[0] if len(options) == 1 else {"anyOf": options})
    if "default" in schema and schema["default"] is None:
        del schema["default"]
    for one in schema.values():
        _without_null(one)


def _lists_of_losses(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema["properties"]["distill"]
    yield schema["$defs"]["CompareEntry"]["properties"]["distill"]


def _items_of_losses(items: dict[str, Any]) -> dict[str, Any]:
    """An entry: its loss's name is known before the rest of it is, which editors go by to complete it."""
    names = [str(get_args(inspect.get_annotations(kind, eval_str=True)["loss"])[0]) for kind in LOSSES]
    named = {"enum": names, "description": "Its name: `kdpipe losses` lists them, `kdpipe losses NAME` explains one."}
    return {"type": "object", "required": ["loss"], "properties": {"loss": named}, "oneOf": items["oneOf"]}
