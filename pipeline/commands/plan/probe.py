"""Time a few steps of each training of a recipe, on a sample of its images, and extrapolate to all of it."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kdpipe.pipeline.commands.plan.existing import open_stores
from kdpipe.pipeline.commands.plan.exports import ExportTime, time_export
from kdpipe.pipeline.recipe.load import trainings_of
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.choice import DEFAULT_BATCH_SIZE
from kdpipe.stages.cache_teacher.estimate import NUM_PROBES
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.exchange import CohortPlan, build_task
from kdpipe.stages.cohort.network import build_cohort
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized
from kdpipe.stages.compress.quantization.qat import calibrate
from kdpipe.stages.compress.quantize_student import prepare
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.data.loader.sampling import num_steps
from kdpipe.stages.data.splits import stratified_subset
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.evaluation.evaluate import evaluate
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.teacher import build_teacher
from kdpipe.stages.train_student.compare import Variant, build_step_job
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import time_steps
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask

MAX_EVALUATED = 128
"""Images that are evaluated, or cached in one batch, at most: enough to time a large network in seconds."""

EVALUATED_BYTES = 2**24
"""Pixels of these images as float32, at most: the outputs of a network's layers take many times that."""

SHORT_S = 0.25
"""What takes less is timed several times, for about so long."""

MIN_STEPS, MAX_STEPS = 12, 100
"""Steps that are run of those, the first two to warm up."""

SPREAD = 1.3
"""The upper end of an estimate, as a multiple of the mean: the machine is not always as busy as now."""


@dataclass(frozen=True)
class Seconds:
    """The lower and the upper end of an estimate, in seconds."""

    low: float
    high: float

    def times(self, count: float) -> Seconds:
        """Return the time of `count` of these."""
        return Seconds(self.low * count, self.high * count)

    def to_json(self) -> list[float]:
        """Return both ends, to three digits: there are no more in them."""
        return [float(f"{each:.3g}") for each in (self.low, self.high)]

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.high + other.high)


@contextmanager
def sample_context(run: Run) -> Iterator[StageContext]:
    """Yield the context of a run in a temporary folder, with one view of a sample of its images."""
    context = run.context
    batches = [train.batch_size for train in trainings_of(run.recipe).values()]
    count = max(NUM_PROBES * evaluated(context), 2 * max(batches))
    train_set = _sample(context.train_set, count)
    if run.recipe.student.is_headless:  # it is for images without labels
        train_set = keep_labels(train_set, "none")
    with tempfile.TemporaryDirectory(prefix="kdpipe-plan-") as folder:
        yield replace(
            context,
            run_dir=Path(folder),
            train_set=train_set,
            test_set=deciding_sample(context, MAX_EVALUATED),
            validation_set=None,
            views=replace(context.views, num_views=1),
            mix_partners=None,
            monitor=RunMonitor(should_stop=context.monitor.should_stop),
            get_teacher_logits=lambda part: None,
            get_teacher_embeddings=lambda part: lambda positions: torch.eye(MAX_EVALUATED)[positions],
            load_test=None,
        )


def evaluated(context: StageContext, most: int = MAX_EVALUATED) -> int:
    """Return the number of images that are evaluated at once: few large ones, so that a plan needs little memory."""
    return max(1, min(most, EVALUATED_BYTES // (4 * math.prod(context.image_shape))))


def deciding_sample(context: StageContext, most: int) -> ImageSet:
    """Return `most` of the images that decide, or fewer large ones."""
    return _sample(context.deciding.test_set, evaluated(context, most))


def probed_cache(config: CacheConfig, context: StageContext) -> CacheConfig:
    """Return the caching with smaller batches where the recipe leaves their size open."""
    size = min(DEFAULT_BATCH_SIZE, evaluated(context)) if config.batch_size == "auto" else config.batch_size
    return replace(config, batch_size=size)


def _sample(image_set: ImageSet, count: int) -> ImageSet:
    """Return some images of each class, in memory if a run would keep them there."""
    rows = stratified_subset(image_set.labels.numpy(), min(count, image_set.num_samples))
    sample = image_set.take(torch.from_numpy(rows))
    if not sample.is_labeled:  # any labels take the same time
        sample = replace(sample, labels=sample.labels.clamp_min(0), listed=None)
    if not isinstance(image_set.images, ImageFiles) or image_set.images.levels is None:
        return sample
    pixels = [torch.from_numpy(sample.read(number)) for number in range(len(sample))]
    return replace(sample, images=torch.stack(pixels))


@dataclass(frozen=True)
class Probe:
    """Times the trainings of a run.

    Attributes:
        run: The run, whose numbers of images count.
        sample: The images to run on.
        teacher: The teacher of the caching.
        features: The features that its store needs.
        store: The run's store, or that of another run which it would use.
        exports: The times of exports, by the network.
    """

    run: Run
    sample: StageContext
    teacher: ModelBundle
    features: Sequence[FeatureSpec]
    store: Path
    exports: dict[str, ExportTime] = field(default_factory=dict)

    def teacher_training(self) -> Seconds:
        """Return the time of the teacher's training, or of the evaluation of a given one."""
        config, seed, sample = self.run.recipe.teacher, self.run.recipe.seed, self.sample
        teacher = build_teacher(config, seed, sample)
        end = self._end("teacher", teacher, sample, exports=config.exports)
        if config.train is None:
            return end
        task = TrainingTask(sample.train_loader, 1, teacher.normalize, fresh_views=True, first_kind=True)
        job = TrainJob("plan", "teacher", teacher.model, task, None, config.train, seed, JobDir(Path()))
        return self._training(job, teacher, sample) + end

    def student_training(self, spec: DistillationSpec | None, config: StudentConfig | None = None) -> Seconds:
        """Return the time of the training of a student, the recipe's by default; alone without `spec`."""
        config = config or self.run.recipe.student
        job = build_step_job(Variant("plan", config, spec), self._context(spec))
        network, context = ModelBundle(job.model, {}, job.task.normalize), config.context(self.sample)
        exports = config.export and not (self.run.recipe.points or self.run.recipe.compare)
        return self._training(job, network, context) + self._end("student", network, context, exports=exports)

    def cohort_training(self, config: CohortConfig, spec: DistillationSpec | None) -> Seconds:
        """Return the time of the training of a cohort, and of the evaluation and export of each member."""
        student, seed = self.run.recipe.student, self.run.recipe.student.seeds[0]
        context = student.context(self._context(spec))
        cohort = build_cohort(config, student, seed, context)
        plan = CohortPlan(config, student, [] if spec is None else [spec] * config.num_members)
        task = build_task(plan, cohort, seed, context)
        job = TrainJob(
            "plan", "cohort", cohort.joint.model, task, None, student.train, seed, JobDir(Path()), task.hooked
        )
        seconds = self._training(job, cohort.joint, context) + self._evaluation(cohort.joint, context)
        for number, model in enumerate(config.models(student.model)):
            role = "student" if model == student.model else f"member {model}"
            seconds += self._end(role, cohort.trained(number), context, exports=student.export)
        return seconds

    def after_compression(self, compressions: Sequence[tuple[str, int]]) -> Seconds:
        """Return the time of the exports and latencies of networks that `kdpipe compress` makes, by kind and seed.

        Each is timed as the student, and written twice: after its training, and among the artifacts.
        """
        config, found = self.run.recipe.compress, self.exports.get("student")
        if found is None:
            student, context = self.run.recipe.student, self.run.recipe.student.context(self.sample)
            network = build_student(student, student.seeds[0], context)
            found = self.exports["student"] = time_export(network, context.image_shape, config.opset)
        files = sum(not kind.endswith("-alone") for kind, _ in compressions)
        seeds = len({seed for _, seed in compressions})
        teacher_s = self.exports["teacher"].latency_s(config) if "teacher" in self.exports else 0.0
        seconds = files * (2 * found.export_s + found.latency_s(config)) + seeds * (teacher_s + found.latency_s(config))
        return Seconds(seconds, SPREAD * seconds)

    def fine_tuning(self, train: TrainConfig, spec: DistillationSpec | None, *, quantized: bool) -> Seconds:
        """Return the time of a fine-tuning of the unpruned student."""
        config, compress = self.run.recipe.student, self.run.recipe.compress
        shared = build_fine_tuning(config, config.seeds[0], spec, self._context(spec), Path())
        network = shared.build_student()
        if quantized:
            model = prepare(
                network.model, shared.evaluation(network.normalize).image_shape, compress.quantize, compress.grid
            )
            if isinstance(model, OnnxQuantized):
                return self._evaluation(network, config.context(self.sample))
            network = replace(network, model=model)
            if compress.quantize.scheme != "int4":
                batches = shared.task(network).stream(0, 2, epoch=0, step=0, epochs=1)
                calibrate(model, [next(iter(batches)).images.cpu()])
        task, layers = shared.task(network), spec.without_hint_losses.student_layers if spec else ()
        job = TrainJob("plan", "student", network.model, task, None, train, shared.seed, JobDir(Path()), layers)
        return self._training(job, network, config.context(self.sample))

    def open_distillation(self, losses: Sequence[Loss] = ()) -> DistillationSpec | None:
        """Return the losses, by default the recipe's, on a store of the sample's targets, or on stores that are there.

        None if the students learn from stores that are not on this machine.
        """
        run, config, losses = self.run, self.run.recipe.student, losses or self.run.recipe.distill
        if run.stores != [run.store]:
            return open_stores(run, self.store, losses)
        path = self.sample.run_dir / "store.zarr"
        cache_teacher(probed_cache(run.recipe.cache, self.sample), path, self.teacher, self.features, self.sample)
        return open_distillation([path], losses, config, {}, self.sample)

    def _context(self, spec: DistillationSpec | None) -> StageContext:
        """Return the sample; of all views where its targets come from a whole store."""
        if spec is None or self.run.stores == [self.run.store]:
            return self.sample
        context = self.run.context
        partners = context.mix_partners or context.train_set
        return replace(self.sample, views=context.views, mix_partners=partners if context.views.mix else None)

    def _training(self, job: TrainJob, network: ModelBundle, context: StageContext) -> Seconds:
        """Return the time of all epochs of a job, each with its evaluation."""
        train, device = job.config, context.device
        if train.epochs == 0:
            return self._evaluation(network, context)
        steps = num_steps(self.run.context.train_set.num_samples, train.batch_size)
        plain = replace(train, epochs=1, class_weights=None, sampler="shuffle")  # the sample has not all labels
        step = _step_time(replace(job, config=plain), device)
        return (step.times(steps) + self._evaluation(network, context)).times(train.epochs)

    def _end(self, role: str, network: ModelBundle, context: StageContext, *, exports: bool) -> Seconds:
        """Return the time of what follows the training of a network: an evaluation, and the export if there is one."""
        seconds = self._evaluation(network, context)
        if not exports:
            return seconds
        if role not in self.exports:
            self.exports[role] = time_export(network, context.image_shape, None)
        export_s = self.exports[role].export_s
        return seconds + Seconds(export_s, SPREAD * export_s)

    def _evaluation(self, network: ModelBundle, context: StageContext) -> Seconds:
        """Return the time of an evaluation on all images that decide."""
        test = context.evaluation(network.normalize)
        network.model.to(context.device)
        evaluate(network.model, test, context.device)
        started, rounds = time.perf_counter(), 0
        while rounds == 0 or time.perf_counter() - started < SHORT_S:
            evaluate(network.model, test, context.device)
            rounds += 1
        per_image = (time.perf_counter() - started) / (rounds * context.test_set.num_samples)
        return Seconds(per_image, SPREAD * per_image).times(self.run.context.deciding.test_set.num_samples)


def _step_time(job: TrainJob, device: torch.device) -> Seconds:
    times_s = time_steps(job, device, 2)[1:]
    if times_s[0] < SHORT_S:
        num_steps = min(MAX_STEPS, max(MIN_STEPS, round(SHORT_S / times_s[0])))
        times_s = time_steps(job, device, num_steps)[2:]
    mean = statistics.fmean(times_s)  # the median would leave out when other processes have the core
    return Seconds(min(statistics.median(times_s), mean), SPREAD * mean)
