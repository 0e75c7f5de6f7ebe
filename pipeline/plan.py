"""`kdpipe plan` and `cache-teacher --dry-run`: what a store will hold, take and cost, for people, on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def print_plan(plan: dict[str, Any]) -> None:
    """A few aligned lines."""
    for name, text in _lines(plan):
        print(f"{name:<12} {text}")  # noqa: T201


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
        yield "time", f"about {_duration(wall_s)}, at {rate:,.0f} images/s for {plan['num_images']:,} images"
    elif not plan["num_images"]:
        yield "time", "none: everything is there"
    if not plan["teacher_trained"]:
        yield "teacher", "not trained yet: run `kdpipe train-teacher` first"


def _duration(wall_s: float) -> str:
    minutes, seconds = divmod(round(wall_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{wall_s:.1f} s"
