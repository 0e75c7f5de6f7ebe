"""Messages on invalid recipes: in plain words, for every key."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
from support.paths import ROOT

from kdpipe.pipeline.recipe.load import load_recipe, recipe_json, validate
from kdpipe.pipeline.recipe.overrides import read_with_overrides

DIGITS = ROOT / "recipes" / "digits.toml"
OF_PYDANTIC = re.compile(r"input|should|valid\b|tuple|dict|instance")


def test_no_words_of_pydantic_in_a_message():
    source, recipe = read_with_overrides(DIGITS, (), {}), recipe_json(load_recipe(DIGITS, (), {}))
    messages = set()
    for place in places(recipe):
        for wrong in ({}, [[1]], "x", -0.5, True):
            messages |= set(validate(dataclasses.replace(source, table=changed(recipe, place, wrong)))[1])
    assert len(messages) > 500
    wanted = {message.rpartition(": ")[2] for message in messages}
    assert [text for text in wanted if OF_PYDANTIC.search(text.partition("; known here")[0])] == []


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ('loss="at", layers=[{ student="stage1" }]', "{'student': 'stage1'}: expected [\"STUDENT MODULE\", \"TEACHER"),
        ('loss="at", layers=[]', "distill.0.layers = []: its number of entries is 0, and must be at least 1."),
        ('loss="kd", weight={start=1.0, till=2}', "unknown key 'distill.0.weight.till'"),
        (f'loss="{"x" * 90}"', f"unknown loss '{'x' * 77}...'"),
    ],
)
def test_a_fault_inside_a_list_or_table_is_told_once(loss, message):
    found = validate(read_with_overrides(DIGITS, [f"distill=[{{ {loss} }}]", "student.train.lr={}"], {}))[1]
    assert sum("distill" in one for one in found) == 1 + loss.count("start")  # `end` is missing too
    assert any(message in one for one in found)
    assert any("lr = {}: it must be a number" in one for one in found)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key below a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*place, key)
        yield from places(inner, (*place, key))


def changed(recipe: dict[str, Any], place: tuple[Any, ...], value: object) -> dict[str, Any]:
    table = copy.deepcopy(recipe)
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return table
