"""The winner of a search as a recipe."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe.pipeline.recipe.load import Recipe, parse_recipe, recipe_json
from kdpipe.pipeline.recipe.search.config import SearchConfig
from kdpipe.pipeline.recipe.sweep import SweepPoint, inline_toml
from kdpipe.pipeline.report.formatting import mean_std
from kdpipe.pipeline.run import Run
from kdpipe.store import write_atomically

BEST = "best.toml"
"""The winner's recipe, in the run folder."""

MAX_NAME = 195


def write_best(run: Run, point: SweepPoint, record: Mapping[str, Any]) -> Path:
    """Write the recipe of a search's winner into the run folder, and return its path."""
    recipe = run.recipe
    best = replace(
        recipe,
        name=f"{recipe.name[:MAX_NAME]}-best",
        student=point.student,
        distill=point.losses,
        compress=point.compress if recipe.search.compress else recipe.compress,
        sweep={},
        search=SearchConfig(),
        compare={},
    )
    text = f"{_head(recipe.name, point, record)}\n{recipe_toml(best)}"
    parse_recipe(tomllib.loads(text), BEST)  # before it is written
    path = run.folder / BEST
    write_atomically(path, text.encode())
    return path


def _head(name: str, point: SweepPoint, record: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in record["final"]["rows"]}
    trial = record["trials"][record["final"]["winner"]]
    lines = [
        f"The winner of `kdpipe search` on the recipe {name}: trial {trial['number']} of {record['num_trials']}.",
        "",
        "Command:   kdpipe run best.toml --workspace DIR, with the folder of that run for its teacher and store",
        f"Hardware:  that of {name}",
        f"Time:      that of {name}, without its teacher and store",
        f"Expect:    {_accuracy(rows['best'])} % on the test images; {name} had {_accuracy(rows.get('recipe'))} %",
        "",
        *(f"{key} = {json.dumps(value)}" for key, value in point.settings.items()),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _accuracy(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else mean_std(row["accuracy_mean"], row["accuracy_std"])


def recipe_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML, with the keys that are not at their defaults; it reads as the same recipe."""
    given = _given(recipe)
    if "callbacks" in given:
        given["callbacks"] = recipe_json(recipe)["callbacks"]  # without secrets
    return "".join(_lines(given))


def _given(section: Any) -> dict[str, Any]:
    """Return the values of a section that are not its defaults, as tables."""
    found = {}
    for one in fields(section):
        value, known = getattr(section, one.name), type(section).__pydantic_fields__[one.name]
        if one.name == "loss" or known.is_required() or value != known.get_default(call_default_factory=True):
            found[one.name] = _plain(value)
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _given(value) if hasattr(type(value), "__pydantic_fields__") else asdict(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items() if own is not None}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: keys, then sections, each with its keys on a line of their own."""
    sections = {key: value for key, value in table.items() if isinstance(value, Mapping) or key == "distill"}
    yield from (f"{key} = {inline_toml(value)}\n" for key, value in table.items() if key not in sections)
    for key, value in sections.items():
        for own in value if isinstance(value, list) else [value]:
            yield f"\n[[{key}]]\n" if isinstance(value, list) else f"\n[{key}]\n"
            yield from (f"{name} = {inline_toml(one)}\n" for name, one in own.items())
