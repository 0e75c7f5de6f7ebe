"""Test images with the predictions of the teacher and the students.

Reads only data on this machine and imports no user module. The teacher's predictions come from the stores; only the
students are run, on the CPU, on a bounded number of images: those of a user's own code from their ONNX files.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdpipe.pipeline.recipe.load import read_run_recipe
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.run import Run
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.load import list_source
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.data.names import FILE_KINDS
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.evaluation.evaluate import in_batches
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, open_session
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.plugins.user_code import is_user_reference
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.store import KdpipeError, is_url

NUM_TOP, NUM_PER_GROUP = 3, 4

MIN_TEST_IMAGES, MAX_TEST_IMAGES, MAX_MACS = 24, 1000, 4e10
"""Test images that the students are run on, within the multiply-accumulates of all of them together."""

MAX_FILES = 100_000
"""Larger image folders are skipped: each file would be examined."""

MAX_SIDE, SMALL_SIDE = 128, 48
"""Pixels to which larger images are downscaled; up to which pixels are shown unsmoothed."""

JPEG_QUALITY = 88

Predictor = Callable[[Tensor], Tensor]

TopClasses = list[tuple[str, float]]
"""The most probable classes with their probabilities, the most probable first."""


@dataclass(frozen=True)
class Sample:
    """An image, uint8 [C, H, W], with its label and predictions by network. source: the data set's sample."""

    image: Tensor
    label: str
    source: str
    predictions: Mapping[str, TopClasses]

    @property
    def is_small(self) -> bool:
        return max(self.image.shape[1:]) <= SMALL_SIDE

    @cached_property
    def url(self) -> str:
        """The image as a data URL: PNG, or JPEG if it is not small, to a tenth of the bytes."""
        pixels = np.ascontiguousarray(self.image.numpy().transpose(1, 2, 0))
        drawn = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        drawn.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        file, kind = io.BytesIO(), "png" if self.is_small else "jpeg"
        drawn.save(file, format=kind, optimize=True, quality=JPEG_QUALITY)
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def samples(page: PageRun) -> dict[str, object]:
    """Return the images and predictions.

    Raises:
        LeftOutError: If the images cannot be read, or no student is finished.
    """
    try:
        run = _open(page)
        if run.recipe.data.task != CLASSIFICATION:
            raise LeftOutError("They are shown with their predicted classes, and these networks predict others.")
        finished = [network for network in page.main if network.kind != "teacher" and network.done]
        if not finished:
            raise LeftOutError("No student is finished yet.")
        students, hidden = _predictors(finished)
        num_macs = sum(int((network.done[0].result or {}).get("num_macs") or 0) for network in finished)
        probabilities = _predict_test(run, students, num_macs)
        groups = list(_instructive(run, probabilities))
    except (KdpipeError, OSError) as error:
        raise LeftOutError(f"The images could not be shown: {error}") from error
    num_images = len(next(iter(probabilities.values())))
    return {"groups": groups, "num_images": f"{num_images:,}", "hidden": [page.without_path(one) for one in hidden]}


def _predictors(networks: Sequence[Network]) -> tuple[dict[str, Predictor], list[str]]:
    """Return what computes each network's predictions, and why others cannot be shown.

    Raises:
        LeftOutError: None can.
    """
    found, hidden = {}, []
    for network in networks:
        try:
            found[network.name] = predictor(JobDir(network.done[0].folder))
        except KdpipeError as error:
            hidden.append(f"{network.name} is not shown: {error}")
    if not found:
        raise LeftOutError(" ".join(hidden))
    return found, hidden


def _open(page: PageRun) -> Run:
    """Open the run's data and stores, unless that would import a user module, download, or scan a very large folder."""
    recipe = read_run_recipe(page.path)
    if recipe is None or any(map(is_user_reference, (recipe.data.name, recipe.views.transform or ""))):
        raise LeftOutError("The images of this run come from a Python module, which a report does not import.")
    data = replace(recipe.data, download=False, num_workers=0)
    run = Run(replace(recipe, device="cpu", data=data), page.path, RunMonitor())
    if any(map(is_url, run.stores)):
        raise LeftOutError("The stores of this run are remote, and a report downloads nothing.")
    if recipe.data.name.partition(":")[0] in FILE_KINDS:
        job = read_json_file(page.networks[0].jobs[0].folder / "job.json") or {}
        if job.get("data", {}).get("num_samples", 0) > MAX_FILES:
            raise LeftOutError(f"A report does not scan more than {MAX_FILES:,} files.")
    return run


def predictor(job: JobDir) -> Predictor:
    """Return what computes probabilities float32 [B, C] for images uint8 [B, C, H, W] with a finished network.

    Raises:
        ModelError: There is no valid file.
    """
    _, record = load_tensors(job.model)
    architecture = record.get("architecture", {})
    if not (is_user_reference(str(architecture.get("model"))) or "source_sha256" in architecture):
        network = rebuild(job.model)
        return lambda images: _softmax(network.model(network.normalize(images)))
    session, normalize = open_session(job.onnx), Normalization.from_json(record)
    return lambda images: _softmax(torch.from_numpy(session.run([OUTPUT], {INPUT: normalize(images).numpy()})[0]))


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(1)


def _predict_test(run: Run, students: Mapping[str, Predictor], num_macs: int) -> dict[str, Tensor]:
    """Return by network the probabilities float32 [N, C] of the first N test images, read from a store or computed.

    `num_macs`, the multiply-accumulates of all students for one image, bounds N.
    """
    num_test = run.context.test_set.num_samples
    num_images = int(min(num_test, MAX_TEST_IMAGES, max(MAX_MACS / max(num_macs, 1), MIN_TEST_IMAGES)))
    loader = run.context.resized(run.recipe.student.image_size).test_loader
    batches = in_batches(torch.arange(num_images), loader)
    images = [loader.get(ViewRequest(indices)).images for indices in batches]
    with torch.no_grad():
        found = {name: torch.cat([student(batch) for batch in images]) for name, student in students.items()}
    get_logits = run.context.get_teacher_logits("test")
    if get_logits is not None and not (teacher := get_logits(torch.arange(num_images))).isnan().any():
        found = {"teacher": teacher.softmax(1), **found}
    return found


def _instructive(run: Run, probabilities: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Sample]]]:
    """Yield groups of test images: those on which the students differ, and those with low teacher confidence."""
    labels = run.context.test_set.labels
    file_name = _file_names(run)
    correct = {name: rows.argmax(1) == labels[: len(rows)] for name, rows in probabilities.items()}
    picked: dict[str, Tensor] = {}
    if {"student alone", "student distilled"} <= set(correct):
        alone, distilled = correct["student alone"], correct["student distilled"]
        picked["Correct only with distillation"] = (distilled & ~alone).nonzero()[:, 0]
        picked["Correct only without distillation"] = (alone & ~distilled).nonzero()[:, 0]
    if "teacher" in probabilities:
        picked["Lowest teacher confidence"] = probabilities["teacher"].amax(1).argsort(stable=True)
    for title, indices in picked.items():
        if len(indices):
            chosen = indices[:NUM_PER_GROUP].tolist()
            yield title, [_test_sample(run, probabilities, index, file_name) for index in chosen]


def _file_names(run: Run) -> Callable[[int], str]:
    """Return what gives the name of a test image's file by its sample id; "" of images that are not files."""
    data = run.recipe.data
    listing = list_source(data, "test", data.image_size or 1)  # nothing is decoded
    files = listing.images
    if not isinstance(files, ImageFileList):
        return lambda _: ""
    positions = {int(sample): number for number, sample in enumerate(listing.sample_ids)}
    return lambda sample: PurePath(files.source.where(positions[sample])).name


def _test_sample(run: Run, probabilities: Mapping[str, Tensor], index: int, file_name: Callable[[int], str]) -> Sample:
    test_set = run.context.test_set
    image = run.context.test_loader.get(ViewRequest(torch.tensor([index]))).images[0]
    predictions = {name: _top(rows[index], test_set.class_names) for name, rows in probabilities.items()}
    label = test_set.label_name(index)
    sample = int(test_set.sample_ids[index])
    return Sample(image, label, file_name(sample) or f"test image {sample}", predictions)


def _top(probabilities: Tensor, names: Sequence[str]) -> TopClasses:
    """Return the most probable classes of probabilities [C]."""
    values, indices = probabilities.topk(min(NUM_TOP, len(probabilities)))
    return [(names[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]
