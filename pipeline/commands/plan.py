"""`kdpipe plan` and `cache-teacher --dry-run`: what a store will hold, take and cost, and which of the recipe's values
come from where, for people, on stdout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipeline.terminal.output import printable
from pipeline.terminal.rate import duration_text

if TYPE_CHECKING:
    from pipeline.recipe.origins import Setting, Settings

NARROWEST, WIDEST = 20, 60
"""Characters that the column of values has at least and at most; longer values are cut off."""


def print_plan(plan: dict[str, Any], settings: Settings | None = None) -> None:
    """A few aligned lines; with `settings` also the keys that are not left at their defaults, and who set them."""
    for name, text in _lines(plan):
        print(f"{name:<12} {printable(text)}")  # noqa: T201
    for line in _setting_lines(settings or {}):
        print(line)  # noqa: T201


def settings_json(settings: Settings) -> dict[str, Any]:
    """What `plan --json` has under "settings": of every key {"value": ..., "origin": ...}."""
    return {key: setting.to_json() for key, setting in settings.items()}


def _setting_lines(settings: Settings) -> Iterator[str]:
    """Key, value and origin of what somebody has set, in groups: a section each."""
    from pipeline.recipe.origins import not_default

    given = not_default(settings)
    values = {key: _shown(setting) for key, setting in given.items()}
    widest_key = max(map(len, given), default=0)
    widest_value = max([NARROWEST, *map(len, values.values())])
    for section, keys in groupby(given, key=_section):
        yield f"\n[{section}]" if section else "\nset in the recipe, and where"
        for key in keys:
            yield f"{printable(key):<{widest_key}}  {values[key]:<{widest_value}}  {printable(given[key].origin)}"


def _section(key: str) -> str:
    return key.partition(".")[0] if "." in key else ""


def _shown(setting: Setting) -> str:
    text = json.dumps(setting.value, ensure_ascii=False)
    return printable(text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}...")


def _lines(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "store", f"{plan['store']} ({'is there' if plan['exists'] else 'new'})"
    yield "views", f"{plan['num_views']} of {plan['num_samples']:,} samples"
    done = plan["num_units"] - plan["num_units_missing"]
    yield (
        "units",
        f"{plan['num_units']} of {plan['unit_rows']:,} rows, {done} done, {plan['num_units_missing']} missing",
    )
    for name, array in plan["arrays"].items():
        wanted = ", ".join(plan["layers_wanted_by"].get(name, [])) or "every store"
        shape = f"{array['dtype']} {array['row_shape']}"
        yield (
            "array",
            f"{name} {shape}: {array['view_bytes']:,} bytes a view, {array['store_bytes']:,} in all ({wanted})",
        )
    beside = plan["test_store"]
    yield "test", f"{beside['num_samples']:,} test images: {beside['store_bytes']:,} bytes in {beside['store']}"
    yield "disk", f"{plan['missing_bytes']:,} bytes to write, {plan['free_bytes']:,} free"
    if plan["probe"]:
        rate, wall_s = plan["probe"]["images_per_s"], plan["probe"]["wall_s"]
        yield "time", f"about {duration_text(wall_s)}, at {rate:,.0f} images/s for {plan['num_images']:,} images"
    elif not plan["num_images"]:
        yield "time", "none: everything is there"
    if not plan["teacher_trained"]:
        yield "teacher", "not trained yet: run `kdpipe train-teacher` first"
