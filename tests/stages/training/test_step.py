"""Tests of training steps in micro-batches after memory ran out."""

import dataclasses
import weakref

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import CACHE, STUDENT, TEACHER, TRAIN, StopAfter, squares, tiny_context
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, build_task, student_shapes
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.losses.distillation import required_of, student_layers
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.nce import Memory
from kdpipe.stages.losses.relations.pkt import PKT
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import Schedule, value_at
from kdpipe.stages.losses.weighted import WeightedLoss
from kdpipe.stages.models import hooks
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import WARNING, RunMonitor
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.training import set_up as set_up_module
from kdpipe.stages.training.checkpoint import Progress, save_checkpoint
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.set_up import set_up
from kdpipe.stages.training.step import TrainStep, depends_on_batch
from kdpipe.stages.training.task import TrainingTask

CONFIG = TrainConfig(epochs=2, batch_size=32, optimizer="adamw", lr=0.01, checkpoint_every_s=0, precision="float32")


class Hungry(nn.Module):
    """Passes on batches of up to `most` samples; for larger ones there is no memory, as each device says it."""

    def __init__(self, most, error=None):
        super().__init__()
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.num_refused = 0

    def forward(self, x):
        if self.training and len(x) > self.most:
            self.num_refused += 1
            raise self.error
        return x


def network(most, *between, error=None):
    torch.manual_seed(0)
    hidden = [nn.Flatten(), nn.Linear(64, 16), *between, nn.ReLU()]
    return nn.Sequential(*hidden, Hungry(most, error), nn.Linear(16, 4))


def job_of(folder, model):
    context = tiny_context(folder, train_set=squares(100, 0))
    folder.mkdir(exist_ok=True)
    task = TrainingTask(context.train_loader, 2, Normalization((0.5,), (0.5,)))
    return TrainJob("train-student", "test", model, task, None, CONFIG, 0, JobDir(folder))


def trained(folder, model, monitor=None):
    history = train(job_of(folder, model), DEVICE, monitor or RunMonitor())
    return model.state_dict(), [line["losses"]["hard_labels"] for line in history]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_train_the_same_student(tmp_path):
    warnings = []
    whole, whole_losses = trained(tmp_path / "whole", network(32))
    monitor = RunMonitor(lambda event: warnings.append(event.job) if event.unit == WARNING else None)
    parts, part_losses = trained(tmp_path / "parts", network(11), monitor)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-5) for name in whole)
    assert whole_losses == pytest.approx(part_losses, rel=1e-5)
    assert warnings == [
        f"out of {'GPU ' * (DEVICE.type == 'cuda')}memory with batches of 32: continuing with micro-batches of 8 whose "
        "gradients are accumulated; the effective batch size stays 32."
    ]


def test_failed_attempt_leaves_no_trace(tmp_path):
    """Neither in batch norm's memory nor in what dropout draws: it is as if the parts had been known before."""
    tries, knows = (network(8, nn.BatchNorm1d(16), nn.Dropout(0.5)) for _ in range(2))
    job = job_of(tmp_path / "knows", knows)
    save_checkpoint(job.job_dir.checkpoint, set_up(job, DEVICE), Progress(micro_batches=4))
    assert_equal(trained(tmp_path / "knows", knows)[0], trained(tmp_path / "tries", tries)[0])
    assert (tries[5].num_refused, knows[5].num_refused) == (2, 0)


class Watched(nn.Module):
    """Notes the size of each batch, and whether the compiled pass still exists."""

    def __init__(self, exists):
        super().__init__()
        self.exists, self.seen = exists, []

    def forward(self, x):
        self.seen.append((len(x), self.exists()))
        return x


def test_compiled_pass_is_freed_before_micro_batches(tmp_path, monkeypatch):
    """A CUDA graph keeps the memory that it allocated before there was no more."""
    made = []

    def compiled(function, device, *, key):
        def run(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        made.append(weakref.ref(run))
        return run

    monkeypatch.setattr(hooks, "compiled", compiled)
    monkeypatch.setattr(set_up_module, "require_compiler", lambda device, key: None)
    model = network(32, watched := Watched(lambda: bool(made) and made[0]() is not None))
    job = job_of(tmp_path / "run", model)
    train(dataclasses.replace(job, config=dataclasses.replace(CONFIG, epochs=1, compile=True)), DEVICE, RunMonitor())
    assert [size for size, _ in watched.seen][:4] == [32, 16, 16, 16]
    assert len(made) == 1 and not any(exists for _, exists in watched.seen)


class Penalty(nn.Module):
    """A distillation loss that shrinks the logits, and may have a state; `schedule` is its weight."""

    configs, losses = {}, {}

    def __init__(self, schedule=0.1, state=False):
        super().__init__()
        self.schedule = schedule
        if state:
            self.register_buffer("num_steps", torch.zeros(()))

    def forward(self, batch):
        return {"penalty": value_at(self.schedule, batch.progress) * batch.student.logits.square().mean()}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("penalty", "number"),
    [(Penalty(), 0), (Penalty(Schedule(start=0.0, end=1.0)), 1), (Penalty(state=True), 1)],
    ids=["constant", "changes", "state"],
)
def test_losses_are_compiled_with_the_network_or_it_is_said(tmp_path, penalty, number):
    said, weights = [], []
    monitor = RunMonitor(lambda event: said.append(event.job) if event.unit == WARNING else None)
    for compiles in (False, True):
        job = job_of(tmp_path / str(compiles), network(32, nn.BatchNorm1d(16), nn.Dropout(0.5)))
        job = dataclasses.replace(job, config=dataclasses.replace(CONFIG, compile=compiles))
        torch._dynamo.utils.counters.clear()
        train(dataclasses.replace(job, task=dataclasses.replace(job.task, distillation=penalty)), DEVICE, monitor)
        weights.append(job.model.state_dict())
    assert_equal(*weights)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [message for message in said if "its losses are not" in message] == said[1:] and len(said) == 1 + number


class ReadsAndOverwrites(nn.Module):
    """Scales by a buffer that the same pass overwrites: torch.compile's backward pass reads the new values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x):
        x = x * self.scale.clone()
        self.scale.copy_(0.5 * self.scale + x.detach().mean(0))
        return x


@pytest.mark.usefixtures("traced")
def test_wrong_gradients_of_the_compiler_are_found(tmp_path):
    job = job_of(tmp_path / "run", network(32, ReadsAndOverwrites()))
    job = dataclasses.replace(job, config=dataclasses.replace(CONFIG, compile=True))
    with pytest.raises(RecipeError, match=r"gradient of student\.1\.\w+ differs by .*: set it to false"):
        train(job, DEVICE, RunMonitor())


def test_warning_names_batch_norm(tmp_path):
    warnings = []
    monitor = RunMonitor(lambda event: warnings.append(event.job) if event.unit == WARNING else None)
    trained(tmp_path / "run", network(16, nn.BatchNorm1d(16)), monitor)
    assert len(warnings) == 1
    assert warnings[0].endswith("stays 32; computed per micro-batch: batch norm.")


def test_job_resumed_with_micro_batches_is_bit_identical(tmp_path):
    whole, stopped, resumed = (network(16, nn.BatchNorm1d(16), nn.Dropout(0.5)) for _ in range(3))
    undisturbed, _ = trained(tmp_path / "undisturbed", whole)
    with pytest.raises(StoppedEarly):
        trained(tmp_path / "stopped", stopped, RunMonitor(should_stop=StopAfter(4)))
    assert_equal(trained(tmp_path / "stopped", resumed)[0], undisturbed)
    assert resumed[5].num_refused == 0  # what did not fit is not tried again


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_cpu_out_of_memory_is_handled(tmp_path, error):
    trained(tmp_path / "run", network(16, error=error))


@pytest.mark.parametrize(("most", "error"), [(0, MemoryError("no")), (16, RuntimeError("mat1 and mat2 do not fit"))])
def test_errors_that_micro_batches_do_not_fix_are_raised(tmp_path, most, error):
    with pytest.raises(type(error), match=str(error)):
        trained(tmp_path / "run", network(most, error=error))


def test_contrastive_memory_is_restored():
    torch.manual_seed(0)
    memory = Memory(10, 4, momentum=0.5)
    memory.update(torch.tensor([1, 2]), torch.randn(2, 4))
    memory.begin_step()
    before = memory.rows.clone()
    memory.update(torch.tensor([2, 3]), torch.randn(2, 4))
    memory.update(torch.tensor([3, 4]), torch.randn(2, 4))
    assert not torch.equal(memory.rows, before)
    memory.undo()
    assert torch.equal(memory.rows, before)


def test_targets_are_split_with_their_samples(tmp_path):
    context = tiny_context(tmp_path, train_set=squares(20, 0))
    task = TrainingTask(context.train_loader, 2, Normalization((0.5,), (0.5,)))
    batch = next(task.stream(0, 10, epoch=0, step=0, epochs=1))
    batch = dataclasses.replace(batch, target_masks=[torch.arange(10) % 2 == 0, None])
    parts = list(batch.split(3))
    assert [len(part.images) for part in parts] == [4, 3, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.hard.labels for part in parts]), batch.hard.labels)
    assert torch.equal(torch.cat([part.target_masks[0] for part in parts]), batch.target_masks[0])
    assert next(iter(batch.split(1))) is batch


def test_losses_that_are_no_means_over_samples_are_named():
    """CRD is [B], but its Z and its memory change with every micro-batch; batch norm is named by itself."""
    shapes, pooled = {"a": (3, 4, 4)}, FeatureSpec("b", "pooled")
    served = {FeatureSpec("b"): (3, 4, 4), pooled: (3,)}

    def depends(config):
        return depends_on_batch(WeightedLoss("loss", config, config.build(shapes, served, DatasetInfo(10, 4))))

    layers = (("a", "b"),)
    assert [depends(one) for one in (CRD(layers=layers, dim=4), PKT(layers=layers), DIST())] == [True] * 3
    assert [depends(one) for one in (KD(), Hint(layers=layers))] == [False] * 2
    assert depends(KD(samples=SampleSelection(filter="hard")))


class Waits(TorchDispatchMode):
    """Records the operations whose results the host waits for, on devices that it does not wait for otherwise."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPERATIONS:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


LAYERS = {
    "fsp": (("stage2", "stage1"),) * 2,  # of as many channels
    "kdsvd": (("stage2.4", "stage1.4"), ("stage2", "stage1")),
    "ofd": (("stage2.4", "stage2.4"),),  # before the ReLU
}


def test_no_loss_waits_for_the_device(tmp_path):
    """A step of all losses together; the synchronizations of a GPU are those of operations that return numbers."""
    kinds = {name: kind for name, kind in LOSSES.builtin.items() if CLASSIFICATION in kind.tasks}
    takes_layers = {name for name, kind in kinds.items() if "layers" in {one.name for one in dataclasses.fields(kind)}}
    losses = [kinds[name](loss=name) for name in sorted(kinds.keys() - takes_layers)]
    for name in sorted(takes_layers - {"simkd", "cat_kd"}):
        losses.append(kinds[name](loss=name, layers=LAYERS.get(name, (("stage2", "stage2"),))))
    context = tiny_context(tmp_path)
    required = required_of(losses, student_shapes(STUDENT, losses, context), 0)
    bundle = build_student(STUDENT, 0, context)
    teacher = ModelBundle(context.build_model(TEACHER.model, seed=0).to(DEVICE), {}, bundle.normalize)
    cache_teacher(CACHE, tmp_path / "store", teacher, required, context)
    task = build_task(bundle, open_distillation([tmp_path / "store"], losses, STUDENT, {}, context), 0, context)
    job = TrainJob("x", "x", bundle.model, task, None, TRAIN, 0, JobDir(tmp_path), student_layers(losses))
    batches = task.stream(0, 32, epoch=0, step=0, epochs=1)
    with extract_features(bundle.model, job.student_layers) as student, Waits() as waits:
        step = TrainStep(job, student, set_up(job, DEVICE), Progress(), RunMonitor())
        for _ in range(2):  # the first one finds layers that are overwritten
            batch = next(batches)
            waits.found.clear()
            step.step(batch)
    assert waits.found == []
