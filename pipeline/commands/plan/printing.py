"""Print a plan: what a run costs, what exists already, and which values of the recipe were set where."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.terminal.output import console, printable
from kdpipe.pipeline.terminal.rate import duration_text
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.store.format.encodings.head import HEAD
from kdpipe.store.format.identity import describe_computation
from kdpipe.store.format.manifest import EMBEDDINGS

if TYPE_CHECKING:
    from rich.console import Console

    from kdpipe.pipeline.recipe.overrides import Setting, Settings

MIN_WIDTH, MAX_WIDTH = 20, 60
"""Width of the column of values, in characters; longer values are cut off."""

NAME_WIDTH = 17

SHOWN_CLASSES = 10
"""With more classes, the largest and the smallest are named."""

_GIB = 2**30


def print_plan(plan: dict[str, Any], settings: Settings | None = None) -> None:
    """Print the plan, and with `settings` the keys that are not at their defaults, to stdout."""
    screen = console()
    for name, text in _lines(plan):
        _print_named(screen, name, text)
    if "stages" in plan:
        print_table(screen, _stage_table(plan))
        for stage in plan["stages"]:
            if stage["note"]:
                _print_named(screen, stage["stage"], f"{stage['what']}: {stage['note']}")
        _print_named(screen, "time", "extrapolated from a few steps of each training on this machine, as it is now")
    for line in _setting_lines(settings or {}):
        print(line)  # noqa: T201


def _print_named(screen: Console, name: str, text: str) -> None:
    """Print a name and a text, whose further lines are indented."""
    indent = " " * (NAME_WIDTH + 1)
    wrapped = textwrap.fill(
        printable(text),
        max(MAX_WIDTH, screen.width - 1),
        initial_indent=f"{name:<{NAME_WIDTH}} ",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    screen.print(wrapped, soft_wrap=True)


def settings_json(settings: Settings) -> dict[str, Any]:
    """Return {"value": ..., "origin": ...} for every key, for `plan --json`."""
    return {key: setting.to_json() for key, setting in settings.items()}


def _setting_lines(settings: Settings) -> Iterator[str]:
    """Yield key, value and origin of each key that was set, by section."""
    from kdpipe.pipeline.recipe.overrides import not_default

    given = not_default(settings)
    values = {key: _shown(setting) for key, setting in given.items()}
    key_width = max(map(len, given), default=0)
    value_width = max([MIN_WIDTH, *map(len, values.values())])
    for section, keys in groupby(given, key=_section):
        yield f"\n[{section}]" if section else "\nset in the recipe, and where"
        for key in keys:
            yield f"{printable(key):<{key_width}}  {values[key]:<{value_width}}  {printable(given[key].origin)}"


def _section(key: str) -> str:
    return key.partition(".")[0] if "." in key else ""


def _shown(setting: Setting) -> str:
    text = json.dumps(setting.value, ensure_ascii=False)
    return printable(text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}...")


def _lines(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _data_lines(plan["data"])
    yield "teacher", _teacher_text(plan["teacher"])
    yield "store", f"{plan['store']} ({'exists' if plan['exists'] else 'new'})"
    yield "views", f"{plan['num_views']} of {plan['num_samples']:,} samples"
    num_missing = plan["num_units_missing"]
    done = plan["num_units"] - num_missing
    yield "units", f"{plan['num_units']} of {plan['unit_rows']:,} rows, {done} done, {num_missing} missing"
    for name, array in plan["arrays"].items():
        required_by = ", ".join(plan["layers_required_by"].get(name, [])) or "every store"
        yield (
            "array",
            f"{name} {array['dtype']} {array['row_shape']}: {array['view_bytes']:,} bytes a view, "
            f"{array['store_bytes']:,} in total ({required_by})",
        )
    if head := plan["head"]:
        required_by = ", ".join(plan["layers_required_by"].get(HEAD, []))
        yield "head", f"{HEAD} float32 {head['shape']}: {head['store_bytes']:,} bytes once ({required_by or 'logits'})"
        if not any(name.startswith("logits") for name in plan["arrays"]):
            row, (num_classes, columns) = plan["arrays"][EMBEDDINGS], head["shape"]
            share = f"{columns - 1} numbers instead of {num_classes} logits"
            more = "" if columns - 1 < num_classes else ": leave out cache.encoding, which takes more here"
            yield "logits", f"a row has {share}, as {row['dtype']}{more}"
    for part in ("test", "validation"):
        if (own := plan.get(f"{part}_store")) is not None:
            yield part, f"{own['num_samples']:,} {part} images: {own['store_bytes']:,} bytes in {own['store']}"
    yield "compute", _compute_text(plan)
    yield "disk", f"{plan['missing_bytes']:,} bytes to write, {plan['free_bytes']:,} free"
    for line in plan["tail_mass"]:
        yield "tail", line
    if plan["probe"]:
        rate, wall_s = plan["probe"]["images_per_s"], plan["probe"]["wall_s"]
        yield "caching", f"about {duration_text(wall_s)}, at {rate:,.0f} images/s for {plan['num_images']:,} images"
    elif not plan["num_images"]:
        yield "caching", "none: the store is complete"
    if memory := plan.get("memory"):
        yield "memory", _memory_text(memory)


def _data_lines(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for split, found in data.items():
        shape = " x ".join(map(str, found["image_shape"]))
        yield (
            f"{split} images",
            f"{found['num_samples']:,} of {found['name']}, {shape}, {_labels_text(found)}",
        )


def _labels_text(found: Mapping[str, Any]) -> str:
    """Return how many samples have labels, if not all, and the classes."""
    if not found["num_labeled"]:
        outputs = {"multilabel": "labels", "regression": "numbers"}.get(found.get("task", ""), "classes")
        return f"unlabeled, {len(found['classes']):,} {outputs}"
    some = "" if found["num_labeled"] == found["num_samples"] else f"{found['num_labeled']:,} labeled, "
    if found.get("task") == "regression":
        return f"{some}{len(found['classes']):,} numbers: {', '.join([*found['classes']][:SHOWN_CLASSES])}"
    text = _class_text(found["classes"])
    return some + (text.replace(" classes", " labels", 1) if found.get("task") == "multilabel" else text)


def _class_text(counts: Mapping[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda each: -each[1])
    if len(ranked) <= SHOWN_CLASSES:
        return f"{len(ranked)} classes: {', '.join(f'{name}: {count:,}' for name, count in counts.items())}"
    most, fewest = ranked[0], ranked[-1]
    return f"{len(ranked):,} classes of {fewest[1]:,} ({fewest[0]}) to {most[1]:,} ({most[0]})"


def _teacher_text(teacher: Mapping[str, Any]) -> str:
    scaling = teacher["normalization"]
    state = f"finished in {teacher['found']}" if teacher["found"] else "not finished yet"
    text = f"{state}; its input is scaled by mean {scaling['mean']} and std {scaling['std']}"
    return f"{text}; {teacher['notes']}" if teacher.get("notes") else text


def _memory_text(memory: Mapping[str, Any]) -> str:
    peak, images, gpu = memory["peak_memory_bytes"], memory["images_bytes"], memory["peak_gpu_memory_bytes"]
    text = f"about {(peak + images) / _GIB:.1f} GiB of RAM in training, {images / _GIB:.1f} GiB of them for images"
    return f"{text}; {gpu / _GIB:.1f} GiB of the GPU's" if gpu else text


def _stage_table(plan: dict[str, Any]) -> Table:
    """Return the table of what is to be made, and how long that takes."""
    stages = plan["stages"]
    rows = [[stage["what"], stage["count"], stage["num_done"], range_text(stage["wall_s"])] for stage in stages]
    rows.append(["all", "", "", range_text(plan["wall_s"])])
    return Table("", ["makes", "number", "finished", "time left"], rows)


def range_text(ends: Sequence[float] | None) -> str:
    """Return a range of durations such as "12 to 16 min".

    >>> range_text([60.0, 90.0]), range_text([95, 130]), range_text([0, 0]), range_text(None)
    ('60 to 90 s', '95 s to 2 min', '-', 'unknown')
    """
    if ends is None:
        return "unknown"
    if not ends[1]:
        return "-"
    low, high = (duration_text(each) for each in ends)
    if low == high:
        return low
    same_unit = low.count(" ") == high.count(" ") == 1 and low.split()[1] == high.split()[1]
    return f"{low.split()[0] if same_unit else low} to {high}"


def _compute_text(plan: dict[str, Any]) -> str:
    """Return how the teacher is computed, as far as that is known before."""
    compute, trial = plan["compute"], plan["compute"]["trial"]
    keys = [f"{key} {compute[key]}" for key in ("precision", "memory_format", "batch_size")]
    text = ", ".join(keys) + (", compiled" if compute["compile"] else "")
    if "auto" in compute.values():
        return f"{text}: auto is decided when the store is created, of a large job by a trial"
    return f"{text}; {describe_computation(compute, trial)}" if trial else text
