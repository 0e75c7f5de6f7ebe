"""Bad input for every recipe key: wrong types, absurd, hostile, missing and unknown values.

The keys come from the schema, so that new ones are covered without a change here.
"""

import copy
import json
import math
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from support.paths import ROOT

from kdpipe.pipeline.recipe.load import load_recipe, parse_recipe
from kdpipe.pipeline.recipe.schema import recipe_json_schema
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.registry import LOSSES

RECIPES = ROOT / "recipes"
SCHEMA = recipe_json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

BASE = {
    "name": "least",
    "views": {"mix": {"mixup_alpha": 0.2}},
    "teacher": {"model": {"name": "cnn"}, "train": {"epochs": 1}},
    "student": {
        "model": {"name": "cnn"},
        "hard_label_weight": {"start": 1.0, "end": 0.0},
        "teachers": {},
        "target_loading": {},
        "train": {},
    },
    "compress": {"prune": {}, "quantize": {}, "prune_train": {}, "quantize_train": {}},
    "compare": {"way": {"distill": [{"loss": "kd"}]}},
    "distill": [{"loss": "kd", "samples": {}}],
}

WRONG = {
    "string": "text",
    "integer": 3,
    "number": 1.5,
    "boolean": True,
    "array": [[[1.5]]],
    "object": {"zzz": 1},
}

FREE_TEXT = ("layers", "exclude", "classifier", "classes")
"""Names inside a network or a data set: what is not there is refused by who looks for it, with what is there."""

FREE_NUMBERS = ("mean", "std")
"""Only have to be finite."""


def resolved(schema):
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def options(schema):
    """Return the alternative types of a key."""
    return [resolved(option) for option in resolved(schema).get("anyOf", [schema])]


def kinds(schema):
    """Return the JSON types of a key."""
    found = set()
    for option in options(schema):
        if "type" in option:
            found.add(option["type"])
    return found | ({"integer"} if "number" in found else set())


def leaves(section, path):
    """Yield path and schema of all keys at and below a section, except those that accept anything."""
    for key, schema in section["properties"].items():
        inner_path = (*path, key)
        inner = [option for option in options(schema) if "properties" in option]
        if key in ("distill", "compare"):
            yield inner_path, {"type": "array" if key == "distill" else "object"}
            continue
        if key not in ("args", "operations"):
            yield inner_path, schema
        for option in inner:
            yield from leaves(option, inner_path)


def entries():
    """Yield the keys of each loss; those that all losses share, only once."""
    seen = set()
    for loss in SCHEMA["properties"]["distill"]["items"]["oneOf"][:-1]:  # the last one is that of python: references
        section = resolved(loss)
        name = section["properties"]["loss"]["const"]
        base = {"loss": name} | ({"layers": [["a", "b"]]} if "layers" in section["required"] else {})
        for path, schema in leaves(section, ()):
            if path != ("loss",) and (path[0] not in ("weight", "samples", "store", "temperature") or path not in seen):
                seen.add(path)
                yield base, path, schema


def with_value(base, path, value):
    table = copy.deepcopy(base)
    section = table
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            return None
    section[path[-1]] = value
    return table


def all_cases():
    way = SCHEMA["$defs"]["CompareEntry"]
    for path, schema in (*leaves(SCHEMA, ()), *leaves(way, ("compare", "way"))):
        yield pytest.param(BASE, path, schema, id=".".join(path))
    for base, path, schema in entries():
        yield pytest.param(base, path, schema, id=f"{base['loss']}.{'.'.join(path)}")


CASES = list(all_cases())


def tables(base, path, value):
    """Return a recipe with the value at `path`; a key of a schedule gets the rest of the schedule too."""
    if path[-2:-1] and path[-1] in ("start", "end", "shape", "epochs") and path[-2] != "train":
        schedule = {"start": 1.0, "end": 2.0, path[-1]: value}
        path, value = path[:-1], schedule
    table = with_value(base, path, value)
    return table if base is BASE else BASE | {"distill": [table]}


def message_for(table):
    """Return the error message for a recipe; None if it is valid."""
    try:
        parse_recipe(table, "r.toml")
    except RecipeError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 700
        return str(error)
    return None


@pytest.mark.parametrize(("base", "path", "schema"), CASES)
def test_every_key_refuses_invalid_values_and_is_named(base, path, schema):
    takes, last = kinds(schema), path[-1]
    refused = []
    for kind, value in WRONG.items():
        if kind not in takes:
            refused.append(value)
    if takes & {"integer", "number"}:
        refused += [math.nan, math.inf, -math.inf, -(10**30)]
        refused += [10**400, 1e308, 10**39 if "number" in takes else 10**30]
    if "string" in takes and last not in FREE_TEXT:
        refused += ["", "\0", "a\nb", "\x1b[31m", "x" * 10**5]
    if "array" in takes and "default" in schema and isinstance(schema["default"], list):
        refused += [[None], [math.nan]]
    for value in refused:
        message = message_for(tables(base, path, value))
        assert message is not None, value
        assert last in message, value
        assert message.startswith("r.toml: ")


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "~nobody/x", "/dev/zero", "a\\b", '"', "𝒳", "s3://b/k?x=1#y", "%00"]
)
def test_unusual_but_valid_paths_are_kept(value):
    table = BASE | {"data": {"root": value}, "cache": {"store": value}}
    recipe = parse_recipe(table, "r.toml")
    assert recipe.data.root == recipe.cache.store == value


def sections(table=BASE, path=()):
    yield path
    for key, value in table.items():
        if isinstance(value, dict):
            yield from sections(value, (*path, key))


@pytest.mark.parametrize("path", [path for path in sections() if path[-1:] != ("compare",)], ids=".".join)
def test_every_section_refuses_unknown_keys(path):
    table = with_value(BASE, (*path, "zzz"), 1)
    assert f"unknown key '{'.'.join((*path, 'zzz'))}'" in message_for(table)
    assert not VALIDATOR.is_valid(table)


@pytest.mark.parametrize("path", ["name", "teacher", "student", "teacher.model", "student.model", "student.model.name"])
def test_missing_required_keys_are_refused(path):
    table = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    section = table
    for key in parents:
        section = section[key]
    del section[last]
    assert f"the key '{path}' is missing" in message_for(table)
    assert not VALIDATOR.is_valid(table)


@pytest.mark.parametrize("text", ["", "\0", "a=1\n[b", "[[[[", "a" * 10**5, "x = " + "[" * 10**5, "x = " + "9" * 10**4])
def test_invalid_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_an_endless_file_is_refused():
    with pytest.raises(RecipeError, match="/dev/zero is not a recipe: it is larger than"):
        load_recipe(Path("/dev/zero"))


def test_deeply_nested_sections_are_refused(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n' + ".".join("a" * 3000) + " = 1\n")
    with pytest.raises(RecipeError):
        load_recipe(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_schema_accepts_the_bundled_recipes(path):
    assert [error.message for error in VALIDATOR.iter_errors(tomllib.loads(path.read_text()))] == []


@pytest.mark.parametrize(("base", "path", "schema"), CASES)
def test_schema_refuses_the_types_the_loader_refuses(base, path, schema):
    for kind, value in WRONG.items():
        if kind not in kinds(schema):
            assert not VALIDATOR.is_valid(tables(base, path, value)), value


def test_schema_is_valid_json_schema():
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert '"null"' not in json.dumps(SCHEMA)
    assert VALIDATOR.is_valid(BASE)


def test_schema_lists_all_losses():
    losses = SCHEMA["properties"]["distill"]["items"]["properties"]["loss"]["anyOf"][0]["enum"]
    assert len(losses) == len(set(losses)) == len(LOSSES.builtin)
    assert {"kd", "crd", "review_kd"} <= set(losses)
    for loss in ("magic", None, 3):
        assert not VALIDATOR.is_valid(BASE | {"distill": [{"loss": loss}]})


def test_schema_has_a_description_for_each_key():
    keys = SCHEMA["$defs"]["CRD"]["properties"]
    descriptions = [keys[key]["description"] for key in ("momentum", "dim", "store")]
    assert len(set(descriptions)) == 3
    assert SCHEMA["properties"]["num_threads"]["description"].startswith("CPU threads of each operation")
    assert all(section["description"] for section in SCHEMA["$defs"].values())
