"""Losses used alone give what training adds for the same outputs, and say what they lack."""

import dataclasses
import doctest
import pkgutil
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from support.device import DEVICE, needs_gpu, without_waits
from support.loss_inputs import (
    DATASET,
    LABELS,
    STUDENT_LOGITS,
    STUDENT_MAPS,
    STUDENT_VECTORS,
    TEACHER_HINTS,
    TEACHER_LOGITS,
    TEACHER_MAPS,
    TEACHER_VECTORS,
    drawn,
)

import kdpipe.stages.losses
from kdpipe.losses import (
    AT,
    CRD,
    DKD,
    KD,
    RKD,
    ATGradient,
    Hint,
    Loss,
    ModelOutput,
    Negatives,
    SampleSelection,
    Schedule,
)
from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.losses.schedules import FINISHED, TrainProgress
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import INPUT, INPUT_GRADIENT, FeatureSpec, compute_statistic, shape_of
from kdpipe.stages.targets.outputs import DenseTargets

GRADIENT = torch.linspace(-1, 1, 8 * 3 * 8 * 8).view(8, 3, 8, 8)
NEGATIVES = Negatives(
    {FeatureSpec("b", "pooled"): torch.linspace(-1, 1, 4 * 32).view(4, 32)}, torch.tensor([9, 8, 9, 8]), torch.arange(4)
)
EXTRAS = {"crd": {"ranks": torch.arange(8), "negatives": NEGATIVES}, "at_gradient": {"input_gradient": GRADIENT}}


EQUAL = ("fsp", "kdsvd")
"""Losses between two layers, of as many channels in student and teacher."""


def loss_named(name):
    """Return a built-in loss with its weight, at the layers a and b if it takes layers."""
    kind = LOSSES.builtin[name]
    keys = {field.name for field in dataclasses.fields(kind)}
    layers = [("a", "b")] * (2 if name in EQUAL else 1)
    changes = {"layers": layers, "num_negatives": 4, "temperature": 3.0 if name != "crd" else 0.1}
    return kind(**{key: value for key, value in changes.items() if key in keys})


def outputs(name):
    """Return the outputs of student and teacher in float32; maps of simkd, fsp and kdsvd have the same shape."""
    student = TEACHER_HINTS if name in ("simkd", *EQUAL) else STUDENT_MAPS
    maps = TEACHER_HINTS if name == "ofd" else TEACHER_MAPS
    teacher = {"b": maps.float(), f"{INPUT}:{INPUT_GRADIENT}": GRADIENT.square().mean(1)}
    teacher |= {"pre_logits": TEACHER_VECTORS.float(), "pre_logits:head": drawn(10, 33, seed=11).float()}
    teacher |= {"b.cam": TEACHER_MAPS[:, :10].float()}
    features = {"a": student.float(), "pre_logits": STUDENT_VECTORS.float()}
    features |= {"a.cam": STUDENT_MAPS[:, :10].float()}
    return ModelOutput(STUDENT_LOGITS.float(), features), ModelOutput(TEACHER_LOGITS.float(), teacher)


def in_training(name, loss):
    """Return the module of the loss in training, and its batch, with targets as a store serves them."""
    student, teacher = outputs(name)
    shapes = {layer: tuple(features.shape[1:]) for layer, features in student.features.items()}
    served = {
        feature: teacher.features[str(feature)]
        if str(feature) in teacher.features
        else compute_statistic(
            feature.for_shape(teacher.features[feature.layer].shape[1:]), teacher.features[feature.layer]
        )
        for feature in loss.required_features(shapes)
    }
    stored = {feature: shape_of(feature, values) for feature, values in served.items()}
    ensemble = TeacherEnsemble(TeachersConfig(), 1, None)
    built = build_distillation([loss], shapes, [stored], ensemble=ensemble, dataset=DATASET, seed=0)
    extras = EXTRAS.get(name, {})
    batch = DistillationBatch(
        student,
        [DenseTargets(teacher.logits, served)],
        [None],
        LABELS,
        torch.arange(8),
        FINISHED,
        {f"{name}_0": NEGATIVES},
        extras.get("input_gradient"),
    )
    return built, batch


@pytest.mark.parametrize("name", LOSSES.builtin)
def test_loss_alone_equals_its_value_in_training(name):
    loss = loss_named(name)
    student, teacher = outputs(name)
    torch.manual_seed(0)
    module = loss.module(student, teacher, num_samples=DATASET.num_samples)
    value = module(student, teacher, LABELS, **EXTRAS.get(name, {}))
    built, batch = in_training(name, loss)
    assert torch.equal(value, *built(batch).values())
    if not list(module.parameters()):
        assert torch.equal(loss(student, teacher, LABELS, **EXTRAS.get(name, {})), value)


def moved(one, device):
    """Return a copy of a batch on a device."""
    if isinstance(one, torch.Tensor):
        return one.to(device, copy=True)
    if isinstance(one, dict):
        return {key: moved(value, device) for key, value in one.items()}
    if isinstance(one, list):
        return [moved(value, device) for value in one]
    if isinstance(one, DistillationBatch | ModelOutput | DenseTargets | Negatives):
        keys = [field.name for field in dataclasses.fields(one)]
        return dataclasses.replace(one, **{key: moved(getattr(one, key), device) for key in keys})
    return one


def with_gradients(name, loss, device, waits):
    """Return the loss in training, and the gradients of the student's outputs and of the loss's parameters."""
    built, batch = in_training(name, loss)
    built, batch = built.to(device), moved(batch, device)
    leaves = [batch.student.logits, *batch.student.features.values(), batch.input_gradient, *built.parameters()]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    with waits():
        (value,) = built(batch).values()
    return value, *torch.autograd.grad(value, leaves, allow_unused=True)


@needs_gpu
@pytest.mark.parametrize("samples", [SampleSelection(), SampleSelection(filter="hard")], ids=["all", "hard"])
@pytest.mark.parametrize("name", LOSSES.builtin)
def test_loss_on_a_gpu_equals_the_cpus_without_waits(name, samples):
    loss = loss_named(name)
    if not loss.per_sample and samples != SampleSelection():
        pytest.skip("takes whole batches")
    loss = dataclasses.replace(loss, samples=samples)
    for own, expected in zip(
        # The eigenvectors of kdsvd are waited for.
        with_gradients(name, loss, DEVICE, nullcontext if name == "kdsvd" else without_waits),
        with_gradients(name, loss, "cpu", nullcontext),
        strict=True,
    ):
        assert (own is None) == (expected is None)
        assert own is None or torch.allclose(own.cpu(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision_is_computed_in_float32():
    student, teacher = STUDENT_LOGITS.half(), TEACHER_LOGITS.half()
    loss = KD(standardize=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_progress_decides_schedules_and_warm_up():
    loss = DKD(weight=Schedule(start=1.0, end=0.5))
    first, last = (loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, progress=TrainProgress(epoch, 40)) for epoch in (0, 39))
    assert first.item() == pytest.approx(2 * last.item() / 20)


def test_teacher_features_are_maps_statistics_or_targets():
    loss = RKD([("a", "b")])
    student, maps = {"a": STUDENT_MAPS}, TEACHER_MAPS.float()
    pooled = maps.mean((2, 3))
    values = [
        loss(student, given)
        for given in (
            {"b": maps},
            {"b:pooled": pooled},
            DenseTargets(TEACHER_LOGITS, {FeatureSpec("b", "pooled"): pooled}),
            ModelOutput(TEACHER_LOGITS, {"b": maps}),
        )
    ]
    assert torch.allclose(torch.stack(values), values[0], rtol=1e-5)


def test_teacher_gets_no_gradient():
    teacher = TEACHER_LOGITS.clone().requires_grad_()
    student = STUDENT_LOGITS.clone().requires_grad_()
    KD()(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


MAPS = ModelOutput(STUDENT_LOGITS, {"a": STUDENT_MAPS}), ModelOutput(TEACHER_LOGITS, {"b": TEACHER_MAPS})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DKD()(STUDENT_LOGITS, TEACHER_LOGITS), "DKD needs the labels"),
        (
            lambda: DKD()(STUDENT_LOGITS, TEACHER_LOGITS, LABELS[:3]),
            r"labels that are int64 \[3\]: give int64 \[8\]",
        ),
        (lambda: KD()(STUDENT_LOGITS, TEACHER_LOGITS[:, :4]), r"\[8, 10\] of the student and \[8, 4\] of the teacher"),
        (lambda: KD()(STUDENT_LOGITS, None), "got NoneType as the teacher's output: give logits"),
        (lambda: AT([("a", "b")])(STUDENT_LOGITS, TEACHER_LOGITS), "needs the student's feature 'a', and only logits"),
        (
            lambda: AT([("a", "c")])(*MAPS),
            "the teacher's feature 'c:attention-8x8', which is not given; given are b",
        ),
        (lambda: AT([("aa", "b")])(*MAPS), "needs the student's feature 'aa', which is not given; .*a"),
        (lambda: Hint([("a", "b")])(*MAPS), r"Hint has parameters that train with the student: .*\.module\("),
        (lambda: CRD([("a", "b")]).module(*MAPS, num_samples=9).float()(*outputs("crd"), LABELS), "CRD contrasts with"),
        (lambda: ATGradient()(*outputs("at_gradient")), "ATGradient needs the gradient"),
        (lambda: KD(samples=SampleSelection(filter="hard"))(STUDENT_LOGITS, TEACHER_LOGITS), "KD needs the labels"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(call, message):
    with pytest.raises(RecipeError, match=message):
        call()


def test_labels_that_are_used_but_not_given_are_an_error():
    class Labeled(Loss):
        def compute(self, inputs):
            return inputs.student.logits.gather(1, inputs.labels[:, None])[:, 0]

    with pytest.raises(RecipeError, match="the loss uses the labels or ranks of the samples, which are not given"):
        Labeled(loss="labeled")(STUDENT_LOGITS, TEACHER_LOGITS)


MODULES = [one.name for one in pkgutil.walk_packages(kdpipe.stages.losses.__path__, "kdpipe.stages.losses.")]


@pytest.mark.parametrize("name", [*MODULES, "kdpipe.losses"])
def test_examples_in_docstrings_run(name, monkeypatch):
    monkeypatch.setattr(LOSSES, "_registered", {})
    results = doctest.testmod(import_module(name), extraglobs={"torch": torch})
    assert not results.failed


def test_every_pure_function_has_an_example():
    functional = import_module("kdpipe.losses.functional")
    parts = ("angle_loss", "distance_loss", "nckd_loss", "tckd_loss")
    assert [name for name in functional.__all__ if ">>>" not in getattr(functional, name).__doc__] == list(parts)


def test_unlabeled_samples_are_refused_where_labels_count():
    labels = torch.where(torch.arange(8) < 4, LABELS, -1)
    with pytest.raises(RecipeError, match="DKD got the label -1: give it the rows of labeled samples"):
        DKD()(STUDENT_LOGITS, TEACHER_LOGITS, labels)
    assert KD()(STUDENT_LOGITS, TEACHER_LOGITS, labels) == KD()(STUDENT_LOGITS, TEACHER_LOGITS)


def test_in_training_a_loss_of_labels_is_on_the_labeled_samples():
    """As samples without targets do, the others count as 0: half of the batch of 8 is labeled."""
    labels = torch.where(torch.arange(8) < 4, LABELS, -1)
    ensemble = TeacherEnsemble(TeachersConfig(), 1)
    distillation = build_distillation([DKD()], {}, [{}], ensemble=ensemble, dataset=DATASET, seed=0)
    teacher = DenseTargets(TEACHER_LOGITS, {})
    hard = HardLabels(labels, always=False)
    batch = DistillationBatch(
        ModelOutput(STUDENT_LOGITS, {}), [teacher], [None], labels, torch.arange(8), FINISHED, {}, None, None, hard
    )
    own = DKD()(STUDENT_LOGITS[:4], TEACHER_LOGITS[:4], LABELS[:4])
    assert distillation(batch)["dkd_0"].item() == pytest.approx(own.item() / 2)
