"""RKD: the reference code's values, triplets in blocks, and batches without relations."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import STUDENT_VECTORS, TEACHER_VECTORS, drawn

from kdpipe.stages.losses.relations.rkd import RKD, angle_loss, cosines, relative_distances, rkd_loss


@pytest.mark.parametrize(
    ("distance_weight", "angle_weight", "expected"),
    [(25.0, 50.0, 1.218926253), (1.0, 0.0, 0.01601492652), (0.0, 1.0, 0.01637106181)],
)
def test_rkd_matches_the_reference_code(distance_weight, angle_weight, expected):
    loss = rkd_loss(STUDENT_VECTORS, TEACHER_VECTORS, distance_weight, angle_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_defaults_match_the_reference_code():
    config = RKD(loss="rkd", layers=(("a", "b"),))
    assert (config.weight, config.distance_weight, config.angle_weight, config.per_sample) == (1.0, 25.0, 50.0, False)


def test_angles_are_those_of_all_triplets():
    vectors = drawn(4, 3, seed=1)
    found = cosines(vectors, 0, 4)
    for i, j, k in itertools.product(range(4), repeat=3):
        expected = 0.0 if i in {j, k} else F.cosine_similarity(vectors[j] - vectors[i], vectors[k] - vectors[i], dim=0)
        assert found[i, j, k].item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("max_cosines", [1, 8 * 32 * 3, 8 * 32 * 5, 8 * 32 * 8])
def test_blockwise_angles_match_with_their_gradient(max_cosines):
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


def test_invariant_to_scaling_rotation_and_translation():
    turned, _ = torch.linalg.qr(drawn(16, 16, seed=1))
    moved = 3 * STUDENT_VECTORS @ turned + 1000
    assert rkd_loss(moved, TEACHER_VECTORS).item() == pytest.approx(
        rkd_loss(STUDENT_VECTORS, TEACHER_VECTORS).item(), rel=1e-6
    )


def test_distances_far_from_the_origin_stay_accurate():
    far = (STUDENT_VECTORS + 1000).float()
    expected = relative_distances(far.double()).float()
    assert torch.allclose(relative_distances(far), expected, rtol=1e-4)


def test_batch_of_one_has_zero_loss():
    assert rkd_loss(torch.ones(1, 4), torch.ones(1, 5)).item() == 0
