"""Inputs of losses: the float64 tensors behind the reference codes' values, and modules built for given features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs
from kdpipe.stages.losses.schedules import FINISHED, TrainProgress
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.feature_spec import FeatureSpec, compute_statistic, shape_of
from kdpipe.stages.targets.outputs import DenseTargets

DATASET = DatasetInfo(num_samples=100, num_classes=10)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT_LOGITS, TEACHER_LOGITS = 3 * drawn(8, 10, seed=1), 3 * drawn(8, 10, seed=2)
LABELS = torch.arange(8) % 10
STUDENT_VECTORS, TEACHER_VECTORS = drawn(8, 16, seed=3), drawn(8, 32, seed=4)
STUDENT_MAPS, TEACHER_MAPS = drawn(8, 16, 8, 8, seed=5).relu(), drawn(8, 32, 8, 8, seed=6).relu()
LARGER_STUDENT_MAPS, THEIR_TEACHER_MAPS = drawn(8, 16, 16, 16, seed=7).relu(), drawn(8, 32, 8, 8, seed=8).relu()
TEACHER_HEAD = drawn(10, 33, seed=11)
STUDENT_HINTS, TEACHER_HINTS = drawn(8, 32, 8, 8, seed=9), drawn(8, 32, 8, 8, seed=10)


def make_inputs(
    student_logits: Tensor = STUDENT_LOGITS,
    teacher_logits: Tensor = TEACHER_LOGITS,
    *,
    labels: Tensor = LABELS,
    student: Mapping[str, Tensor] | None = None,
    teacher: Mapping[FeatureSpec, Tensor] | None = None,
    progress: TrainProgress = FINISHED,
) -> LossInputs:
    """Return a loss's inputs; ranks are 0 to B - 1."""
    return LossInputs(
        ModelOutput(student_logits, student or {}),
        DenseTargets(teacher_logits, teacher or {}),
        labels,
        torch.arange(len(labels)),
        progress,
    )


def build_loss(
    config: Loss,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    progress: TrainProgress = FINISHED,
) -> tuple[nn.Module, LossInputs]:
    """Return the module, and its inputs as a store would give them, for features by layer."""
    torch.manual_seed(0)
    shapes = {layer: tuple(features.shape[1:]) for layer, features in student.items()}
    stored = {
        feature: teacher[str(feature)] if feature.is_head else compute_statistic(feature, teacher[feature.layer])
        for feature in config.required_features(shapes)
    }
    module = config.build(shapes, {feature: shape_of(feature, values) for feature, values in stored.items()}, DATASET)
    return module.to(dtype), make_inputs(student=student, teacher=stored, progress=progress)


def loss_of_pair(config: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean loss at the layers ("a", "b"), of features [B, ...] of student and teacher."""
    module, inputs = build_loss(config, {"a": student}, {"b": teacher})
    mean: Tensor = module(inputs).mean()
    return mean


def assert_zero_and_flat(loss: Tensor, student: Tensor, *, atol: float = 0.0, gradient: float = 1e-12) -> None:
    """Run the backward pass, and check that loss and gradient vanish."""
    loss.backward()
    assert abs(loss.item()) <= atol
    assert student.grad is not None
    assert student.grad.abs().max() <= gradient


def assert_finite(loss: Tensor, *leaves: Tensor) -> None:
    """Run the backward pass, and check that loss and gradients are finite."""
    loss.backward()
    assert torch.isfinite(loss)
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
