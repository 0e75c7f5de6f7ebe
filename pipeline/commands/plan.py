"""Print what `cache-teacher` would do, and which values of the recipe were set where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.preflight import preflight
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import printable
from kdpipe.pipeline.terminal.rate import duration_text
from kdpipe.stages.cache_teacher.choice import require_available
from kdpipe.stages.cache_teacher.estimate import first_logits, known_settings, plan_cache, probe
from kdpipe.stages.cache_teacher.plan import top_k_of
from kdpipe.stages.errors import ModelError
from kdpipe.stages.given_teacher import require_given
from kdpipe.stages.targets.tail_mass import TailMass, tail_of
from kdpipe.stages.teacher import load_teacher, teacher_folder, untrained_teacher
from kdpipe.store import encode_topk, open_store
from kdpipe.store.format.identity import describe_computation
from kdpipe.store.format.topk import TAIL

if TYPE_CHECKING:
    from kdpipe.pipeline.recipe.overrides import Setting, Settings
    from kdpipe.stages.models.bundle import ModelBundle

MIN_WIDTH, MAX_WIDTH = 20, 60
"""Width of the column of values, in characters; longer values are cut off."""


def print_plan(plan: dict[str, Any], settings: Settings | None = None) -> None:
    """Print the plan, and with `settings` the keys that are not at their defaults, to stdout."""
    for name, text in _lines(plan):
        print(f"{name:<12} {printable(text)}")  # noqa: T201
    for line in _setting_lines(settings or {}):
        print(line)  # noqa: T201


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
    for part in ("test", "validation"):
        if (own := plan.get(f"{part}_store")) is not None:
            yield part, f"{own['num_samples']:,} {part} images: {own['store_bytes']:,} bytes in {own['store']}"
    yield "compute", _compute_text(plan)
    yield "disk", f"{plan['missing_bytes']:,} bytes to write, {plan['free_bytes']:,} free"
    if plan["probe"]:
        rate, wall_s = plan["probe"]["images_per_s"], plan["probe"]["wall_s"]
        yield "time", f"about {duration_text(wall_s)}, at {rate:,.0f} images/s for {plan['num_images']:,} images"
    elif not plan["num_images"]:
        yield "time", "none: the store is complete"
    for line in plan["tail_mass"]:
        yield "tail", line
    if not plan["teacher_trained"]:
        yield "teacher", "not trained yet: run `kdpipe train-teacher` first"


def _compute_text(plan: dict[str, Any]) -> str:
    """Return how the teacher is computed, as far as that is known before."""
    compute, trial = plan["compute"], plan["compute"]["trial"]
    keys = [f"{key} {compute[key]}" for key in ("precision", "memory_format", "batch_size")]
    text = ", ".join(keys) + (", compiled" if compute["compile"] else "")
    if "auto" in compute.values():
        return f"{text}: auto is decided when the store is created, of a large job by a trial"
    return f"{text}; {describe_computation(compute, trial)}" if trial else text


def run_plan(run: Run, with_probe: bool) -> dict[str, Any]:
    """Return what `cache-teacher` would do, and with `with_probe` an estimate of its time."""
    config, recipe = run.recipe.cache, run.recipe
    trained = teacher_folder(run.folder).result() is not None
    load = load_teacher if trained else untrained_teacher
    teacher = load(recipe.teacher, recipe.seed, run.context)
    require_given(recipe.teacher, teacher, run.context)
    required = run.required_features(teacher)
    try:
        require_available(config.precision, run.device)
        preflight(run)
    except ModelError as error:  # the store can be planned all the same
        run.monitor.warn("plan", f"`kdpipe run` would be refused: {error}")
    plan = plan_cache(config, run.store, teacher, list(required), run.context, trained=trained)
    for part, (path, images) in run.evaluation_stores(run.store).items():
        own = plan_cache(config.for_test, path, teacher, [], images, trained=trained)
        plan |= {key: plan[key] + own[key] for key in ("missing_bytes", "num_images")} | {f"{part}_store": own}
    timed, compute = with_probe and plan["num_images"] > 0, plan["compute"]
    known = replace(config, batch_size=compute["batch_size"])
    teacher = replace(teacher, compute=known_settings(compute))
    measured = probe(known, teacher, list(required), run.context, plan["num_images"]) if timed else None
    required_by = {feature.array: reasons for feature, reasons in required.items()}
    tails = [str(found) for found in _tail_masses(run, teacher, plan)] if config.top_k and trained else []
    return {
        **plan,
        "teacher_trained": trained,
        "layers_required_by": required_by,
        "tail_mass": tails,
        "probe": measured,
    }


def _tail_masses(run: Run, teacher: ModelBundle, plan: dict[str, Any]) -> list[TailMass]:
    """Return the mass of the classes that the store does not keep, from the store, else from a first batch."""
    if plan["exists"] and not plan["num_units_missing"]:
        store = open_store(run.store)
        return run.tail_masses(store.manifest.top_k, tail_of(store))
    top_k, logits = top_k_of(run.recipe.cache, run.context), first_logits(run.recipe.cache, teacher, run.context)
    return [] if top_k is None else run.tail_masses(top_k, encode_topk(logits, top_k, "float32")[TAIL])
