"""How a student of the Python API is trained: what `train_student` begins, and `compress` continues."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.runs import RunOptions, write_run_recipe
from kdpipe.stages.compress.compress import CompressConfig, compressed_root
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext, samples_of
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.classifier_reuse import reuse_own_classifier
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.distillation.teacher_accuracy import teacher_embeddings, teacher_logits
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.open import local_store_path, test_store_path
from kdpipe.stages.training.job_dir import read_json_file, write_json_file
from kdpipe.stages.views.config import Views
from kdpipe.store import FingerprintMismatch, canonical_json, differences, is_url, make_folders, read_store_manifest
from kdpipe.store.redact import redacted_json

RECORD = "recipe.json"
"""The record of the settings and inputs in a folder of compressed networks other than `compressed/`."""


@dataclass(frozen=True)
class StudentJob:
    """How a student is trained.

    Attributes:
        config: The `student` section of the recipe.
        seed: Its seed.
        losses: The distillation losses; none for a student on hard labels alone.
        places: The paths or URLs of the stores.
        train_set: The training images.
        test_set: The test images.
        views: The views of the training images.
        run: The run folder.
        validation_set: The images that decide in place of the test images.
    """

    config: StudentConfig
    seed: int
    losses: tuple[Loss, ...]
    places: tuple[Path | str, ...] = field(repr=False)
    train_set: ImageSet
    test_set: ImageSet
    views: Views
    run: Path
    validation_set: ImageSet | None = None

    @property
    def kind(self) -> str:
        return DISTILLED if self.losses else ALONE

    def context(self, run_options: RunOptions) -> StageContext:
        """Return the context, without its run folder, in which the teachers' logits of the test images are read."""
        local = [local_store_path(place, RunMonitor()) for place in self.places[:1]]
        store, validation_set = next(iter(local), None), self.validation_set
        context = run_options.context(
            self.train_set, self.test_set, self.views, store=store, validation_set=validation_set
        )
        beside = [test_store_path(place) for place in self.places]
        if not beside or not all(is_url(place) or Path(place).exists() for place in beside):
            return context
        get_logits = partial(teacher_logits, self.places, self.config.teachers, context)
        get_embeddings = partial(teacher_embeddings, self.places, context)
        return replace(context, get_teacher_logits=get_logits, get_teacher_embeddings=get_embeddings)

    def open_stores(self, context: StageContext) -> DistillationSpec | None:
        """Open and check the stores; None for a student on hard labels alone."""
        if not self.losses:
            return None
        return open_distillation(self.places, self.losses, self.config, {}, context)

    def load(self, folder: Path) -> ModelBundle:
        """Load the trained network of a folder, in eval mode on the CPU."""
        context = RunOptions(device="cpu", progress=False).context(self.train_set, self.test_set, self.views)
        tensors, _ = load_tensors(folder / "model.safetensors")
        image_shape = context.resized(self.config.image_size).image_shape
        bundle = build_student(self.config, self.seed, context)
        bundle = reuse_own_classifier(bundle, self.losses, tensors, image_shape)
        bundle.model.load_state_dict(tensors)
        bundle.model.eval()
        return bundle

    def sections(self) -> dict[str, Any]:
        """Return the sections of the recipe that trains it, as far as they are known here."""
        teacher: dict[str, Any] = {"model": {"name": "none"}}
        if self.places and not is_url(self.places[0]):
            stored = read_store_manifest(Path(self.places[0])).identity.teacher
            architecture = stored["architecture"]
            teacher = {"model": {"name": architecture["model"], "args": architecture["args"]}}
            teacher |= stored["normalization"]
        model = self.config.model
        student = replace(self.config, model=ModelConfig(name=model.name, args=model.args, weights=model.weights))
        return {
            "data": {"name": self.train_set.name},
            "views": asdict(self.views),
            "teacher": teacher,
            "student": asdict(student),
            "distill": [asdict(loss) for loss in self.losses],
        }


def claim_compression(job: StudentJob, trained: StudentJob, config: CompressConfig, folder: Path | None) -> Path:
    """Return the folder of a compression, with a record of what decides its networks.

    That of `compressed/`, the default, is recipe.json of the run, as the command line has it.

    Args:
        job: How it is fine-tuned.
        trained: How the student was trained.
        config: The `compress` section.
        folder: The folder that the user chose.

    Raises:
        FingerprintMismatch: The folder holds a compression with other settings.
    """
    main = compressed_root(job.run, replace(config, student=None))
    wanted = {"settings": _settings(config), "inputs": _other_inputs(trained, job)}
    stored = _main_settings(job.run)
    fits_main = wanted == {"settings": stored or wanted["settings"], "inputs": {}}
    if folder is None:
        digest = hashlib.sha256(canonical_json(wanted).encode()).hexdigest()[:12]
        folder = main if fits_main else main.with_name(f"{main.name}-{digest}")
    if folder == main:
        found = [] if fits_main else differences({"settings": stored or {}, "inputs": {}}, wanted)
    elif (record := read_json_file(folder / RECORD)) is None:
        if folder.exists() and any(folder.iterdir()):
            raise RecipeError(f"folder {folder} has files of others: name a new one.")
        found = []
    else:
        found = differences({key: record.get(key) for key in wanted}, wanted)
    if found:
        raise FingerprintMismatch(f"the compression in {folder}", found, "Name another folder, or leave folder= out.")
    if folder == main:
        write_run_recipe(job.run, {"compress": asdict(config)})
    else:
        make_folders([folder])
        write_json_file(folder / RECORD, {"compress": asdict(config), **wanted})
    return folder


def _main_settings(run: Path) -> dict[str, Any] | None:
    """Return what decides the networks in `compressed/`; None if there are none yet."""
    stored = (read_json_file(run / "recipe.json") or {}).get("compress")
    is_free = not (run / "compressed").exists() and not (run / "run.json").exists()  # a record of the command line
    return None if is_free or stored is None else _settings(CompressConfig(**stored))


def _settings(config: CompressConfig) -> dict[str, Any]:
    """Return what decides the exported files; steps that are not done and measurements do not."""
    found: dict[str, Any] = {"steps": config.steps, "student": config.student, "opset": config.opset}
    if config.prunes:
        found |= {"prune": asdict(config.prune), "prune_train": config_fingerprint(config.prune_train)}
    if config.quantizes:
        found |= {"quantize": asdict(config.quantize), "quantize_train": config_fingerprint(config.quantize_train)}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _other_inputs(trained: StudentJob, job: StudentJob) -> dict[str, Any]:
    """Return the images and stores to fine-tune on where they are not those of the training."""
    found: dict[str, Any] = {}
    places, before = (redacted_json(list(map(str, one.places))) for one in (job, trained))
    if places != before:  # other passwords are no other stores
        found["stores"] = places
    if job.train_set is not trained.train_set:
        before, now = (samples_of(one).digests() for one in (trained.train_set, job.train_set))
        found |= {"data": now} if now != before else {}
    return found
