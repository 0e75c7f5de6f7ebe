"""Build the JSON Schema (2020-12) of recipes, by which editors complete and check keys."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.describe import attributes_of
from kdpipe.stages.losses.registry import LOSSES


class _RecipeSchema(GenerateJsonSchema):
    """Pydantic's schema, with descriptions from docstrings, and without null, which TOML does not have."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        made = super().default_schema(schema)
        return {key: value for key, value in made.items() if (key, value) != ("default", None)}

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        made = super().dataclass_schema(schema)
        made["description"] = _sentence(inspect.cleandoc(schema["cls"].__doc__ or "").partition("\n\n")[0])
        for key, text in attributes_of(schema["cls"]).items():
            if key in made["properties"]:
                made["properties"][key]["description"] = _sentence(text)
        if issubclass(schema["cls"], Loss):
            made["properties"]["loss"].pop("default", None)
            made["required"] = ["loss", *made.get("required", ())]
        return made


def recipe_json_schema() -> dict[str, Any]:
    """Return the schema: every key with its type, bounds, default and description."""
    schema = TypeAdapter(Recipe).json_schema(schema_generator=_RecipeSchema)
    for section in (schema, schema["$defs"]["CompareEntry"], schema["$defs"]["CohortConfig"]):
        section["properties"]["distill"]["items"] = _items_of_losses(section["properties"]["distill"]["items"])
    schema["properties"]["compare"] |= {
        "additionalProperties": False,  # the names have a pattern
        "description": "Variants of the training to compare on the same student, by name, for `kdpipe compare`.",
    }
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "kdpipe recipe"}


def _sentence(text: str) -> str:
    plain = " ".join(text.split())
    return plain[:1].upper() + plain[1:]


def _items_of_losses(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an entry, with the names of losses first, by which editors complete it."""
    reference = {"type": "string", "pattern": r"^python:[^:]+:[^:]+$"}
    named = {
        "anyOf": [{"enum": LOSSES.names()}, reference],
        "description": "Name of the loss: `kdpipe losses` lists them, `kdpipe losses NAME` explains one.",
    }
    own = {"properties": {"loss": reference}, "description": "A loss of your own, python:package.module:name."}
    return {"type": "object", "required": ["loss"], "properties": {"loss": named}, "oneOf": [*items["oneOf"], own]}
