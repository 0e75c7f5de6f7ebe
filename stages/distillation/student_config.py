"""The recipe's `student` section, and the folders of students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from kdpipe.stages.config import KindName, PathStr, Seed, section, unique
from kdpipe.stages.context import StageContext
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.join import Missing
from kdpipe.stages.targets.reader import TargetLoadingConfig
from kdpipe.stages.training.heads import Heads
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views

ALONE, DISTILLED = "alone", "distilled"


def _as_tuple(given: Any) -> Any:
    """Return a list as a tuple, so that it may stand beside objects in Python."""
    return tuple(given) if isinstance(given, list) else given


@section
class StudentConfig:
    """Configuration of the student and its training: once for each seed, alone and distilled, all else equal.

    Attributes:
        model: The network.
        train: Epochs, optimizer and schedule.
        seeds: The seeds; each gives a student alone and a distilled one.
        baseline: Whether to train the student alone too, which the distilled one is compared with.
        export: Whether to write an ONNX file, which `kdpipe compress` needs; that is tried before training.
        hard_label_weight: The weight of the cross entropy with the labels beside the distillation losses.
        label_smoothing: The share of each label that is spread over all classes; also for the student alone.
        hard_label_views: The kinds of views (`views.kinds`) with that cross entropy, which is the mean over them; by
            default all; also for the student alone.
        heads: Its classifiers for labels and teacher, if it has two; the student alone learns with its output.
        stores: The target stores; by default the one that this recipe's `cache-teacher` fills. Several stores are
            several teachers, combined by `teachers`; a loss on features names its store.
        teachers: How several teachers are combined.
        missing_targets: Samples without targets are an "error", or are trained on "hard-labels" only.
        target_loading: How targets are loaded.
        mean: The input's mean for each channel; by default that of the training images.
        std: The input's standard deviation for each channel.
        image_size: Side of the square to which the views are resized for the student; by default it sees the teacher's.
        output: What it returns: "logits", or "embeddings" without a classifier, for a teacher of embeddings. The
            default of images without labels is the teacher's.
    """

    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(unique)] = (0, 1, 2)
    baseline: bool = True
    export: bool = True
    hard_label_weight: Scheduled = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hard_label_views: Annotated[tuple[KindName, ...], BeforeValidator(_as_tuple), AfterValidator(unique)] = ()
    heads: Heads = Field(default_factory=Heads)
    stores: tuple[PathStr, ...] = Field(default=(), repr=False)
    teachers: TeachersConfig = Field(default_factory=TeachersConfig)
    missing_targets: Missing = "error"
    target_loading: TargetLoadingConfig = Field(default_factory=TargetLoadingConfig)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    output: Literal["logits", "embeddings"] = "logits"

    @property
    def hard_labels(self) -> dict[str, Any]:
        """What decides which views have labels, for fingerprints; empty by default."""
        return {"hard_label_views": list(self.hard_label_views)} if self.hard_label_views else {}

    @property
    def is_headless(self) -> bool:
        """Whether the student returns embeddings in place of logits."""
        return self.output == "embeddings"

    def context(self, context: StageContext) -> StageContext:
        """Return the context of the student's networks: its image size, and what it returns."""
        own = context.resized(self.image_size)
        return own.for_embeddings if self.is_headless else own


def view_warning(views: Views) -> str | None:
    """Return a warning for views that limit the accuracy of distillation, or None."""
    if not views.augments and views.num_views > 1:
        return (
            f"views.num_views = {views.num_views}, but nothing changes the images: the store has the same outputs "
            f"{views.num_views} times; add views.operations, or set views.num_views = 1."
        )
    if not views.augments or (views.replay and views.num_views > 1):
        return None
    reason = (
        "views.replay = false: the student sees other views than those of its targets."
        if not views.replay
        else "views.num_views = 1: the student sees the same view of each image in every epoch."
    )
    return (
        f"{reason} Against many consistent views, one fixed view cost a ResNet-50 on ImageNet-1k 1.2 points in 30 "
        "epochs, 2.3 in 300, 3.0 in 1,200 and 4.8 in 9,600 (Beyer et al. 2022); docs/views.md has figures for small "
        "students."
    )


def student_folder(run: Path, kind: str, seed: int) -> JobDir:
    """Return the folder of a student, ALONE or DISTILLED, of a run."""
    return JobDir(run / "students" / f"{kind}-seed{seed}")
