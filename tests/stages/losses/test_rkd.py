"""RKD: the reference code's numbers, triplets in blocks, and batches without relations."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import STUDENT_MAPS, STUDENT_VECTORS, TEACHER_VECTORS, drawn, said

from stages.forms import Wanted
from stages.losses.rkd import RKDConfig, angle_loss, cosines, distance_loss, relative_distances, rkd_loss
from stages.losses.said import Facts

FACTS = Facts(num_samples=100, num_classes=10)


@pytest.mark.parametrize(
    ("distance_weight", "angle_weight", "expected"),
    [(25.0, 50.0, 1.218926253), (1.0, 0.0, 0.01601492652), (0.0, 1.0, 0.01637106181)],
)
def test_rkd_is_the_reference_codes_number(distance_weight, angle_weight, expected):
    loss = rkd_loss(STUDENT_VECTORS, TEACHER_VECTORS, distance_weight, angle_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_defaults_are_the_reference_codes():
    config = RKDConfig(loss="rkd", layers=(("a", "b"),))
    assert (config.weight, config.distance_weight, config.angle_weight, config.per_sample) == (1.0, 25.0, 50.0, False)


def test_angles_are_those_of_all_triplets():
    vectors = drawn(4, 3, seed=1)
    found = cosines(vectors, 0, 4)
    for i, j, k in itertools.product(range(4), repeat=3):
        expected = 0.0 if i in {j, k} else F.cosine_similarity(vectors[j] - vectors[i], vectors[k] - vectors[i], dim=0)
        assert found[i, j, k].item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("max_cosines", [1, 8 * 32 * 3, 8 * 32 * 5, 8 * 32 * 8])
def test_angles_in_blocks_are_those_of_the_whole_with_their_gradient(max_cosines):
    whole, blocks = STUDENT_VECTORS.clone().requires_grad_(), STUDENT_VECTORS.clone().requires_grad_()
    loss, in_blocks = angle_loss(whole, TEACHER_VECTORS), angle_loss(blocks, TEACHER_VECTORS, max_cosines)
    loss.backward()
    in_blocks.backward()
    assert in_blocks.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(blocks.grad, whole.grad, rtol=1e-9, atol=0)


def test_no_tensor_of_angles_is_above_the_stated_size():
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    student, teacher = drawn(16, 24, seed=1).requires_grad_(), drawn(16, 4, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        angle_loss(student, teacher, max_cosines=16 * 24 * 2).backward()
    assert 16 * 24 < max(sizes) <= 16 * 24 * 2


@pytest.mark.parametrize("loss", [distance_loss, angle_loss, lambda s, t: angle_loss(s, t, 4 * 5)])
def test_the_gradient_equals_finite_differences(loss):
    student, teacher = drawn(4, 3, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    assert torch.autograd.gradcheck(lambda vectors: loss(vectors, teacher), student)


def test_scaling_turning_and_moving_the_student_changes_nothing():
    turned, _ = torch.linalg.qr(drawn(16, 16, seed=1))
    moved = 3 * STUDENT_VECTORS @ turned + 1000
    assert rkd_loss(moved, TEACHER_VECTORS).item() == pytest.approx(
        rkd_loss(STUDENT_VECTORS, TEACHER_VECTORS).item(), rel=1e-6
    )


def test_distances_far_from_the_origin_keep_their_digits_in_float32():
    far = (STUDENT_VECTORS + 1000).float()
    expected = relative_distances(far.double()).float()
    assert torch.allclose(relative_distances(far), expected, rtol=1e-4)


def test_student_equal_to_teacher_is_0_and_flat():
    student = TEACHER_VECTORS.clone().requires_grad_()
    loss = rkd_loss(student, TEACHER_VECTORS)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() < 1e-12


EDGES = {
    "a batch of one": torch.ones(1, 4),
    "two zero rows": torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 3], [2, 1, 0]]),
    "identical rows": torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [2, 1, 0]]),
    "nothing but identical rows": torch.ones(4, 3),
    "rows that are nearly the same": torch.ones(4, 3) + torch.eye(4, 3) / 512,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("edge", EDGES)
def test_loss_and_gradient_are_finite_at_the_edges(edge, dtype):
    student = EDGES[edge].clone().to(dtype).requires_grad_()
    loss = rkd_loss(student, drawn(len(student), 5, seed=2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert loss.dtype == torch.float32


def test_a_batch_of_one_costs_nothing():
    assert rkd_loss(torch.ones(1, 4), torch.ones(1, 5)).item() == 0


def test_the_term_is_the_sum_over_pairs_of_pooled_layers():
    config = RKDConfig(loss="rkd", layers=(("a", "b"), ("c", "b")), angle_weight=3.0)
    shapes = {"a": (16, 8, 8), "c": (16,)}
    wanted = Wanted("b", "pooled")
    assert config.student_layers() == ("a", "c")
    assert config.wants(shapes) == (wanted, wanted)
    term = config.build(shapes, {wanted: (32,)}, FACTS)
    loss = term(said(student={"a": STUDENT_MAPS, "c": STUDENT_VECTORS}, teacher={wanted: TEACHER_VECTORS}))
    expected = sum(rkd_loss(side, TEACHER_VECTORS, 25.0, 3.0) for side in (STUDENT_MAPS.mean((2, 3)), STUDENT_VECTORS))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
