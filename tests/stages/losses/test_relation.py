"""Losses on relations between samples share their checks: gradients, edges, and sums over pairs of layers."""

import pytest
import torch
from support.loss_inputs import (
    STUDENT_MAPS,
    STUDENT_VECTORS,
    TEACHER_MAPS,
    TEACHER_VECTORS,
    assert_finite,
    assert_zero_and_flat,
    build_loss,
    drawn,
)

from kdpipe.stages.losses.relations.pkt import PKT, pkt_loss
from kdpipe.stages.losses.relations.rkd import RKD, angle_loss, distance_loss, rkd_loss
from kdpipe.stages.losses.relations.sp import SP, sp_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec

LOSSES = {"pkt": pkt_loss, "rkd": rkd_loss, "sp": sp_loss}
WEIGHTS = {"pkt": 30000, "rkd": 1, "sp": 3000}
PAIRS = (("a", "b"), ("c", "d"))

EDGES = {
    "a batch of one": torch.ones(1, 4),
    "one zero": torch.zeros(1, 4),
    "a zero row": torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 2, 3], [2, 1, 0]]),
    "two zero rows": torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 3], [2, 1, 0]]),
    "zero rows": torch.zeros(4, 3),
    "opposite rows": torch.tensor([[1.0, 2], [-1, -2]]),
    "identical rows": torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [2, 1, 0]]),
    "only identical rows": torch.ones(4, 3),
    "nearly identical rows": torch.ones(4, 3) + torch.eye(4, 3) / 512,
    "large rows": torch.full((4, 3), 3e4),
}
MAP_EDGES = {"zero maps": torch.zeros(4, 2, 3, 3), "large maps": torch.full((4, 2, 3, 3), 3e4)}


@pytest.mark.parametrize(
    "loss", [pkt_loss, sp_loss, distance_loss, angle_loss, lambda s, t: angle_loss(s, t, max_cosines=4 * 5)]
)
def test_gradient_matches_finite_differences(loss):
    student, teacher = drawn(4, 3, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    assert torch.autograd.gradcheck(lambda vectors: loss(vectors, teacher), student)


def test_gradient_of_maps_matches_finite_differences():
    student, teacher = drawn(4, 2, 2, 1, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    assert torch.autograd.gradcheck(lambda maps: sp_loss(maps, teacher), student)


@pytest.mark.parametrize(
    ("name", "features", "gradient"),
    [("pkt", TEACHER_VECTORS, 1e-8), ("rkd", TEACHER_VECTORS, 1e-12), ("sp", TEACHER_MAPS, 1e-12)],
)
def test_zero_and_flat_at_agreement(name, features, gradient):
    student = features.clone().requires_grad_()
    assert_zero_and_flat(LOSSES[name](student, features), student, gradient=gradient)  # pkt's eps moves its minimum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "edge"), [(name, edge) for name in LOSSES for edge in EDGES] + [("sp", edge) for edge in MAP_EDGES]
)
def test_loss_and_gradient_are_finite_at_the_edges(name, edge, dtype):
    student = (EDGES | MAP_EDGES)[edge].clone().to(dtype).requires_grad_()
    loss = WEIGHTS[name] * LOSSES[name](student, drawn(len(student), 5, seed=2))
    assert loss.dtype == torch.float32
    assert_finite(loss, student)


@pytest.mark.parametrize(
    ("config", "loss"),
    [(PKT(loss="pkt", layers=PAIRS), pkt_loss), (RKD(loss="rkd", layers=PAIRS, angle_weight=3.0), None)],
)
def test_module_sums_pairs_of_pooled_layers(config, loss):
    loss = loss or (lambda student, teacher: rkd_loss(student, teacher, 25.0, 3.0))
    assert (config.per_sample, config.student_layers()) == (False, ("a", "c"))
    assert config.required_features({}) == (FeatureSpec("b", "pooled"), FeatureSpec("d", "pooled"))
    student = {"a": STUDENT_MAPS, "c": STUDENT_VECTORS}
    module, inputs = build_loss(config, student, {"b": TEACHER_VECTORS, "d": TEACHER_VECTORS})
    expected = sum(loss(vectors, TEACHER_VECTORS) for vectors in (STUDENT_MAPS.mean((2, 3)), STUDENT_VECTORS))
    assert module(inputs).item() == pytest.approx(expected.item(), rel=1e-4)


def test_sp_sums_pairs_of_whole_layers():
    config = SP(loss="sp", layers=PAIRS)
    assert (config.per_sample, config.required_features({})) == (False, (FeatureSpec("b"), FeatureSpec("d")))
    student, teacher = {"a": STUDENT_MAPS, "c": STUDENT_VECTORS}, {"b": TEACHER_MAPS, "d": TEACHER_VECTORS}
    module, inputs = build_loss(config, student, teacher)
    expected = sp_loss(STUDENT_MAPS, TEACHER_MAPS) + sp_loss(STUDENT_VECTORS, TEACHER_VECTORS)
    assert module(inputs).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("config", [PKT, SP])
def test_default_weights_match_the_reference_code(config):
    name = config.__name__.removesuffix("Config").lower()
    assert config(loss=name, layers=PAIRS).weight == WEIGHTS[name]
