"""How a student of the Python API is trained: what `train_student` begins, and `compress` continues."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe.runs import RunOptions
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.distillation.teacher_accuracy import teacher_logits
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.open import local_store_path, test_store_path
from kdpipe.stages.views.config import Views
from kdpipe.store import is_url, read_store_manifest


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
    """

    config: StudentConfig
    seed: int
    losses: tuple[Loss, ...]
    places: tuple[Path | str, ...]
    train_set: ImageSet
    test_set: ImageSet
    views: Views
    run: Path

    @property
    def kind(self) -> str:
        return DISTILLED if self.losses else ALONE

    def context(self, run_options: RunOptions) -> StageContext:
        """Return the context, without its run folder, in which the teachers' logits of the test images are read."""
        local = [local_store_path(place, RunMonitor()) for place in self.places[:1]]
        context = run_options.context(self.train_set, self.test_set, self.views, store=next(iter(local), None))
        beside = [test_store_path(place) for place in self.places]
        if not beside or not all(is_url(place) or Path(place).exists() for place in beside):
            return context
        return replace(context, get_teacher_logits=lambda: teacher_logits(self.places, self.config.teachers, context))

    def open_stores(self, context: StageContext) -> DistillationSpec | None:
        """Open and check the stores; None for a student on hard labels alone."""
        if not self.losses:
            return None
        return open_distillation(self.places, self.losses, self.config, {}, context)

    def load(self, folder: Path) -> ModelBundle:
        """Load the trained network of a folder, in eval mode on the CPU."""
        context = RunOptions(device="cpu", progress=False).context(self.train_set, self.test_set, self.views)
        bundle = build_student(self.config, self.seed, replace(context, run_dir=self.run), self.losses)
        bundle.model.load_state_dict(load_tensors(folder / "model.safetensors")[0])
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
