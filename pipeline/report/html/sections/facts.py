"""What a run is: its data, teacher, student and losses; and the network to ship, with the code that runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.report.formatting import interval_text, kib, mean_std
from kdpipe.pipeline.report.html.read import PageRun, recommended
from kdpipe.pipeline.report.networks import num_training_images
from kdpipe.pipeline.report.rows import Row
from kdpipe.pipeline.report.verdict import setting_of
from kdpipe.stages.training.job_dir import read_json_file

CODE = """# pip install onnxruntime numpy pillow
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({path})
facts = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}}
channels, height, width = facts["image_shape"]
mean, std = (np.float32(facts["normalization"][key]).reshape(-1, 1, 1) for key in ("mean", "std"))

image = ImageOps.exif_transpose(Image.open("image.png")).convert("L" if channels == 1 else "RGB")
border = (1 - facts["test_crop"]) / 2
image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, bleed=border)
pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255)
logits = session.run(["logits"], {{"images": ((pixels - mean) / std)[None]}})[0]
{show}"""

SHOW = {
    "multilabel": 'print([name for name, logit in zip(facts["class_names"], logits[0]) if logit > 0])',
    "regression": 'print(dict(zip(facts["class_names"], logits[0].tolist())))',
}
"""What a task's outputs mean; those of others are of classes."""


def facts(run: PageRun) -> dict[str, object]:
    rows, found = list(_facts(run)), _to_ship(run)
    if found is None:
        return {"facts": rows, "code_lines": []}
    row, file, why = found
    inside = str(Path(run.folder_name) / file.relative_to(run.path))
    costs = [f"{mean_std(row.accuracy_mean, row.accuracy_std)} % {row.tested}"]
    costs += [f"95 % interval {interval_text(row.interval)}"] if row.interval else []
    costs += [kib(row.file_bytes)] if row.file_bytes else []
    rows += [("to ship", f"{row.name} ({'; '.join(costs)}): {inside}")]
    rows += [("why", why)] if why else []
    return {"facts": rows, "code_lines": _code(run, inside).splitlines()}


def _code(run: PageRun, path: str) -> str:
    """Return the lines that run the network at `path`."""
    show = SHOW.get(str(run.recipe.get("data", {}).get("task")), 'print(facts["class_names"][logits[0].argmax()])')
    return CODE.format(path=json.dumps(path, ensure_ascii=False), show=show)


def _facts(run: PageRun) -> Iterator[tuple[str, str]]:
    """Yield name and description of what went into the run."""
    recipe = run.recipe
    yield "data", ", ".join([str(recipe.get("data", {}).get("name", "")), *_sizes(run)]).removeprefix(", ")
    for kind in ("teacher", "student"):
        row, network = run.row(kind), run.network(kind)
        if network is not None and (model := recipe.get(kind, {}).get("model")):
            yield kind, _model(model) + (f", {row.num_parameters:,} parameters" if row else "")
    views = recipe.get("views", {})
    kinds = views.get("kinds")
    if not isinstance(kinds, Mapping) or not kinds:
        kinds = {"": views.get("operations")}
    named = {kind: _names(operations) for kind, operations in kinds.items()}
    listed = [f"{kind} ({names})" if kind else names for kind, names in named.items() if kind or names]
    if number := views.get("num_views"):
        yield "views", f"{number} of each image" + (f": {', '.join(listed)}" if listed else "")
    if terms := list(_losses(recipe)):
        yield "loss", " + ".join(terms)


def _names(operations: Any) -> str:
    return ", ".join(str(one["name"]) for one in operations or [] if isinstance(one, Mapping))


def _sizes(run: PageRun) -> Iterator[str]:
    """Yield the number of training images, test images and classes, as far as they are recorded."""
    if number := num_training_images(job.folder for network in run.main for job in network.jobs):
        labels = setting_of(recipe=run.recipe, distilled=()).num_labels
        yield f"{number:,} training images" + ("" if labels is None else f" ({labels:,} labeled)")
    if classes := next((row.per_class for row in run.report.rows if row.per_class), None):
        yield f"{sum(one.num_samples for one in classes):,} test images"
        yield f"{len(classes):,} classes"


def _model(model: Any) -> str:
    if not isinstance(model, Mapping):
        return str(model)
    given = ", ".join(f"{name} {_value(value)}" for name, value in (model.get("args") or {}).items())
    return f"{model['name']} ({given})" if given else str(model["name"])


def _losses(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield the terms of the distilled student's loss with their weights."""
    weight = recipe["student"].get("hard_label_weight")
    if weight and recipe.get("distill"):
        yield f"{_value(weight)} × hard labels"
    for loss in recipe.get("distill") or []:
        keys = [f"{key} {_value(loss[key])}" for key in ("temperature", "layers") if loss.get(key) is not None]
        yield f"{_value(loss.get('weight', 1))} × {loss['loss']}" + (f" ({'; '.join(keys)})" if keys else "")


def _value(value: Any) -> str:
    """Return a number, a text, or pairs of layers, "student/teacher"."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join("/".join(map(str, one)) if isinstance(one, list) else str(one) for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _to_ship(run: PageRun) -> tuple[Row, Path, str] | None:
    """Return the recommended network, its ONNX file, and why: a compressed one, or else the distilled student."""
    best = recommended(run)
    if best is not None and (row := run.row(best[0])) is not None:
        card = read_json_file(best[1].parent / "card.json") or {}
        seed = best[1].parent.name.removeprefix("artifacts-seed")
        return row, best[1] / "model.onnx", f"{card['reason']} (seed {seed})" if card.get("reason") else ""
    student = run.row("student")
    if student is None or not student.files:
        return None
    return student, Path(student.files[0]), "kdpipe compress has not made a smaller one yet"
