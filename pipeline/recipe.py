"""Recipes: a TOML file, one experiment; read strictly, overridden by --set, and refused in one clear sentence."""

from __future__ import annotations

import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError

from stages.compare import CompareEntry, WayName
from stages.compress import CompressConfig
from stages.config import section
from stages.datasets.load import DataConfig
from stages.errors import RecipeError, RunError
from stages.job_folder import read_json
from stages.losses.terms import LossConfig
from stages.store_plan import CacheConfig
from stages.teaching import check_losses
from stages.train_student import StudentConfig
from stages.train_teacher import TeacherConfig
from stages.views.config import ViewsConfig
from stages.views.renderer import check_views


@section
class Recipe:
    """One experiment, from teacher to INT8 student.

    name: also the name of its run folder below `runs/`.
    seed: of the teacher; each student has its own (student.seeds), views have theirs (views.seed).
    device: auto, cpu, cuda or cuda:N.
    num_threads: CPU threads of each operation; by default the cores that the affinity mask leaves. Networks of a few
    thousand parameters train fastest on one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    data: DataConfig = Field(default_factory=DataConfig)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    teacher: TeacherConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    student: StudentConfig
    distill: tuple[LossConfig, ...] = ()
    compare: dict[WayName, CompareEntry] = Field(default_factory=dict)
    compress: CompressConfig = Field(default_factory=CompressConfig)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe at `path`, with `key.key=value` overrides. Raises RecipeError where anything is amiss."""
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from error
    for override in overrides:
        _override(table, override)
    return parse_recipe(table, str(path))


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from what its file holds. Raises RecipeError, naming key and value, where anything is amiss."""
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_json(json.dumps(table, default=str))
        check_views(recipe.views)
        check_losses(recipe.distill, recipe.views, recipe.student.teachers)
        for name, entry in recipe.compare.items():
            check_losses(entry.distill, recipe.views, recipe.student.teachers, f"compare.{name}.distill")
    except ValidationError as error:
        raise RecipeError(_sentence(where, error)) from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return recipe


def read_run_recipe(run: Path) -> Recipe | None:
    """The resolved recipe of a run folder; None where there is none. Raises RunError where it is no recipe."""
    record = read_json(run / "recipe.json")
    if record is not None and isinstance(compress := record.get("compress"), dict):
        compress.pop("latency_batch_size", None)  # of an older kdpipe, which timed batches of one size
    try:
        return None if record is None else parse_recipe(record, str(run / "recipe.json"))
    except RecipeError as error:
        raise RunError(
            f"{run} holds something else than a run of this kdpipe ({error}): use another folder."
        ) from error


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe: every key with the value in force. `parse_recipe` reads it back."""
    resolved: dict[str, Any] = asdict(recipe)
    return resolved


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set takes key=value, such as student.train.lr=0.05, not {override!r}.")
    *parents, last = key.strip().split(".")
    at: Any = table
    for parent in parents:
        at = at[_index(at, parent, override)] if isinstance(at, list) else at.setdefault(parent, {})
        if not isinstance(at, dict | list):
            raise RecipeError(f"--set {override}: {parent!r} is not a section.")
    at[_index(at, last, override) if isinstance(at, list) else last] = _value(text.strip())


def _index(items: list[Any], number: str, override: str) -> int:
    if number.isdecimal() and int(number) < len(items):
        return int(number)
    raise RecipeError(f"--set {override}: {number!r} is not the number of an entry, 0 to {len(items) - 1}.")


def _value(text: str) -> Any:
    """A TOML value; what is not one is a string, so that --set student.model.name=cnn needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(where: str, error: ValidationError) -> str:
    """One sentence for the first thing that is wrong, and how many more there are."""
    errors = [one for one in error.errors() if not _of_another_kind(one)] or error.errors()
    first, location = errors[0], _keys(errors[0])
    key = _shown(location)
    num_others = len({_shown(_keys(one)) for one in errors} - {key})
    more = f" ({num_others} more like this)" if num_others else ""
    if first["type"] == "unexpected_keyword_argument":
        known = _known_keys(Recipe, location[:-1])
        near = get_close_matches(location[-1], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"{where}: unknown key {key!r}{more}; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: the key {key!r} is missing{more}: give it a value."
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        losses = [str(_tag(kind)) for kind in get_args(get_args(LossConfig)[0])]
        return f"{where}: {key} needs a loss that exists{more}; known are {', '.join(losses)}."
    found, message = str(first["input"]), first["msg"].removeprefix("Value error, ")
    return f"{where}: {key} = {found[:80]}: {message[0].lower()}{message[1:]}{more}."


def _of_another_kind(error: Mapping[str, Any]) -> bool:
    """Whether an error says that a table is no number, or a number no table, where either may stand."""
    return error["type"] == "dataclass_type" or (
        isinstance(error["input"], dict)
        and error["type"] != "extra_forbidden"
        and error["type"] in ("float_type", "string_type", "literal_error", "tuple_type")
    )


def _keys(error: Mapping[str, Any]) -> list[str]:
    """Where an error is: the keys, without pydantic's names for the alternatives that a value has."""
    parts = [str(part) for part in error["loc"]]
    named = parts[:2] if parts[:1] == ["compare"] else []  # names of entries are people's own
    found = [part for part in parts[len(named) :] if re.fullmatch(r"[a-z0-9_]+", part)]
    return named + [part for part in found if part not in ("float", "int", "str")]


def _shown(location: list[str]) -> str:
    """The keys as people write them: without the tag by which pydantic tells losses apart."""
    tag = location.index("distill") + 2 if "distill" in location else len(location)
    return ".".join(location[:tag] + location[tag + 1 :])


def _known_keys(kind: Any, location: list[str]) -> list[str]:
    """The keys that the section at `location` has, by walking the types of the recipe."""
    if get_origin(kind) is Annotated:
        return _known_keys(get_args(kind)[0], location)
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if is_dataclass(option)]
        if len(options) > 1 and location:
            options = [option for option in options if _tag(option) == location[0]]
            location = location[1:]
        return _known_keys(options[0], location) if options else []
    if get_origin(kind) in (dict, tuple):
        return _known_keys(get_args(kind)[1 if get_origin(kind) is dict else 0], location[1:])
    if not is_dataclass(kind):
        return []
    if not location:
        return [field.name for field in fields(kind)]
    return _known_keys(typing.get_type_hints(kind, include_extras=True).get(location[0]), location[1:])


def _tag(kind: Any) -> str | None:
    """The value of a loss section's `loss` key."""
    hint = typing.get_type_hints(kind).get("loss")
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else None
