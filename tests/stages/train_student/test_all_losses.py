"""Every loss trains a student from a store, resumes identically, and leaves a plain student."""

import dataclasses
import json
from typing import get_args

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import CACHE, STUDENT, TEACHER, StopAfter, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher, train_student, train_teacher
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, student_shapes
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.losses.distillation import required_of
from kdpipe.stages.losses.features.fitnet import FitNet, InitialLoss
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.feature_spec import source_shapes
from kdpipe.stages.targets.resolve import smallest_feature
from kdpipe.stages.teacher import load_teacher, untrained_teacher
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.store import StoreError

STUDENT_CONFIG = dataclasses.replace(
    STUDENT,
    model=ModelConfig(name="cnn_average", args={"width": 4, "num_stages": 2}),
    train=TrainConfig(epochs=2, batch_size=32, lr=0.01, checkpoint_every_s=0),
)
BIG = dataclasses.replace(TEACHER, model=ModelConfig(name="cnn_average", args={"width": 8, "num_stages": 2}))
TRAIN_SET = squares(96, 0)

LAYERS = {
    "ab": (("stage1.4", "stage1.4"), ("stage2.4", "stage2")),  # batch norms before a ReLU
    "ofd": (("stage2.4", "stage2.4"),),
    "fsp": (("stage2", "stage1"), ("stage2", "stage1")),  # of as many channels
    "kdsvd": (("stage2.4", "stage1.4"), ("stage2", "stage1")),
}


def entry(kind):
    """Return a loss's configuration, with the tiny networks' layers if it takes layers."""
    keys = {field.name for field in dataclasses.fields(kind)}
    (name,) = get_args(kind.__pydantic_fields__["loss"].annotation)
    changes = {"layers": LAYERS.get(name, (("stage2", "stage2"),)), "num_negatives": 16, "stage_epochs": 1}
    return kind(loss=name, **{key: value for key, value in changes.items() if key in keys})


ENTRIES = [entry(kind) for kind in LOSSES.builtin.values() if CLASSIFICATION in kind.tasks]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a teacher, and a store of all features that any loss requires."""
    folder = tmp_path_factory.mktemp("ways")
    context = tiny_context(folder, train_set=TRAIN_SET)
    train_teacher(BIG, 0, context)
    teacher = load_teacher(BIG, 0, context)
    wanted = required_of(ENTRIES, student_shapes(STUDENT_CONFIG, ENTRIES, context), 0)
    shapes = source_shapes(teacher.model, wanted, context.image_shape)
    cache_teacher(
        CACHE, folder / "store.zarr", teacher, [smallest_feature(one, shapes[one.source]) for one in wanted], context
    )
    return folder


def train(run, losses, folder, *, monitor=None, config=STUDENT_CONFIG, stores=("store.zarr",)):
    context = tiny_context(run, monitor, train_set=TRAIN_SET)
    spec = open_distillation([run / name for name in stores], losses, config, {}, context)
    seat = StudentRun(JobDir(folder), "a student", with_onnx=False)
    train_student(config, 0, spec, context, student_run=seat)
    return seat.job_dir


@pytest.fixture
def deterministic(monkeypatch):
    """Make operations an error on the GPU that have no kernel with a fixed order of sums."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(DEVICE.type == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loss", ENTRIES, ids=lambda one: one.loss)
@pytest.mark.usefixtures("deterministic")
def test_every_loss_trains_and_exports_a_plain_student(run, tmp_path, loss):
    folder = train(run, (loss,), tmp_path / "student")
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    names = {"hard_labels"} | (set() if isinstance(loss, InitialLoss) else {f"{loss.loss}_0"})
    assert [set(line["losses"]) for line in lines] == [names] * 2
    assert all(value > 0 for line in lines for value in line["losses"].values())
    plain = build_student(STUDENT_CONFIG, 0, tiny_context(run, train_set=TRAIN_SET)).model.state_dict()
    weights = load_tensors(folder.model)[0]
    if loss.loss == "simkd":  # the classifier is that of the store
        teacher = load_tensors(run / "teacher" / "model.safetensors")[0]
        assert torch.equal(weights["fc.weight"], teacher["fc.weight"])
        assert any("projector" in name for name in weights)
    else:
        assert {name: one.shape for name, one in weights.items()} == {name: one.shape for name, one in plain.items()}


STATEFUL = {
    **{
        name: ([one for one in ENTRIES if one.loss == name], STUDENT_CONFIG)
        for name in ("crd", "ofd", "gkl", "ab", "ft")
    },
    "fitnet": (
        [
            FitNet(loss="fitnet", layers=(("stage1", "stage1"), ("stage2", "stage2")), stage_epochs=1),
            KD(loss="kd"),
        ],
        STUDENT_CONFIG,
    ),
    "simkd": ([one for one in ENTRIES if one.loss == "simkd"], STUDENT_CONFIG),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_repeatedly_stopped_training_is_identical(run, tmp_path, name):
    losses, config = STATEFUL[name]
    if name == "fitnet":
        context = tiny_context(run, train_set=TRAIN_SET)
        wanted = required_of(losses, student_shapes(config, losses, context), 0)
        cache_teacher(CACHE, run / "store.zarr", load_teacher(BIG, 0, context), wanted, context)
    uninterrupted = train(run, losses, tmp_path / "uninterrupted")
    for number in range(60):
        try:
            stopped = train(
                run, losses, tmp_path / "stopped", monitor=RunMonitor(should_stop=StopAfter(2 + number % 3))
            )
            break
        except StoppedEarly:
            continue
    assert stopped.model.read_bytes() == uninterrupted.model.read_bytes()
    assert not list(stopped.path.rglob("checkpoint*"))


def test_hint_stage_trains_only_up_to_its_layer(run, tmp_path):
    loss = FitNet(loss="fitnet", layers=(("stage1", "stage2"),), stage_epochs=1)
    with pytest.raises(StoppedEarly):  # in the student's own training, which comes after 3 steps
        train(run, (loss, KD(loss="kd")), tmp_path / "student", monitor=RunMonitor(should_stop=StopAfter(5)))
    after = load_tensors(tmp_path / "student" / "hint1" / "model.safetensors")[0]
    before = build_student(STUDENT_CONFIG, 0, tiny_context(run, train_set=TRAIN_SET)).model.state_dict()
    changed = {name.partition(".")[0] for name, one in after.items() if not torch.equal(one, before[name])}
    assert changed == {"stage1"}


def test_learnable_weights_train_and_are_not_in_the_student(run, tmp_path):
    context = tiny_context(run, train_set=TRAIN_SET)
    cache_teacher(CACHE, run / "second.zarr", untrained_teacher(BIG, 5, context), [], context)
    config = dataclasses.replace(STUDENT_CONFIG, teachers=TeachersConfig(weights="learnable"))
    losses, stores = (KD(loss="kd"),), ("store.zarr", "second.zarr")
    uninterrupted = train(run, losses, tmp_path / "one", config=config, stores=stores)
    with pytest.raises(StoppedEarly):
        train(run, losses, tmp_path / "two", config=config, stores=stores, monitor=RunMonitor(should_stop=StopAfter(4)))
    scores = load_tensors(tmp_path / "two" / "checkpoint.safetensors")[0]["modules/distillation.ensemble.scores"]
    assert scores.abs().min() > 0
    resumed = train(run, losses, tmp_path / "two", config=config, stores=stores)
    assert resumed.model.read_bytes() == uninterrupted.model.read_bytes()
    assert not any("scores" in name for name in load_tensors(uninterrupted.model)[0])


def test_adapters_train_and_are_in_the_checkpoints(run, tmp_path):
    hint = next(one for one in ENTRIES if one.loss == "hint")
    for steps in (1, 4):
        with pytest.raises(StoppedEarly):
            train(run, (hint,), tmp_path / str(steps), monitor=RunMonitor(should_stop=StopAfter(steps)))
    name = "modules/distillation.losses.hint_0.loss.pairs.0.adapter.0.weight"
    one, four = (load_tensors(tmp_path / steps / "checkpoint.safetensors")[0][name] for steps in ("1", "4"))
    assert (one - four).abs().max() > 1e-4


def test_attention_network_trains_with_at_gradient(run, tmp_path):
    """Fused attention has no second derivative."""
    at_gradient = next(one for one in ENTRIES if one.loss == "at_gradient")
    config = dataclasses.replace(STUDENT_CONFIG, model=ModelConfig(name="python:support.tiny_attention:attentive"))
    folder = train(run, (at_gradient,), tmp_path / "student", config=config)
    assert (json.loads(folder.metrics.read_text().splitlines()[-1])["losses"]["at_gradient_0"]) > 0


def test_missing_feature_error_has_the_command_that_adds_it(run, tmp_path):
    at = next(one for one in ENTRIES if one.loss == "at")
    lacking = dataclasses.replace(at, layers=(("stage1", "pool1"),))
    with pytest.raises(
        StoreError, match=r"has no attention-8x8 of 'pool1', only .*cache.layers = \['pool1:attention-8x8'\]"
    ):
        train(run, (lacking,), tmp_path / "student")
