"""KD-SVD against RepDistiller's form with torch's own decomposition, in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import DATASET, build_loss, drawn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.statistics.kdsvd import KDSVD, kdsvd_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec

STUDENT = [drawn(8, 5, 4, 4, seed=1), drawn(8, 6, 3, 3, seed=2), drawn(8, 5, 2, 4, seed=3)]
TEACHER = [drawn(8, 5, 6, 6, seed=4), drawn(8, 6, 4, 4, seed=5), drawn(8, 5, 5, 4, seed=6)]


def decomposed(maps, count):
    """Return the singular values and right singular vectors of one map [C, H, W], each with a positive sum."""
    _, values, rows = torch.linalg.svd(maps.flatten(1).T, full_matrices=False)
    vectors = rows.T[:, :count]
    return values[:count], vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)


def formula(student, teacher, k):
    """Return the loss of one sample, from its maps by layer."""
    before, total = None, 0.0
    for own, other in zip(student, teacher, strict=True):
        values, wanted = decomposed(other, k)
        _, some = decomposed(own, k + 3)
        nearest = []
        for column in wanted.T:
            cosines = [float(one @ column) for one in some.T]
            best = max(range(len(cosines)), key=lambda number: abs(cosines[number]))
            nearest.append(some[:, best] * (1 if cosines[best] > 0 else -1))
        scale = F.normalize(values, dim=0)
        now = torch.stack(nearest, 1) * scale, wanted * scale
        if before is not None:
            functions = [torch.exp(-((now[i][:, None] - before[i][None]) ** 2) / 8) for i in (0, 1)]
            total += ((functions[0] - functions[1]) ** 2).sum().item()
        before = now
    return total


@pytest.mark.parametrize("k", [1, 2])
def test_values_are_those_of_the_formula(k):
    found = kdsvd_loss(STUDENT, TEACHER, k)
    expected = [formula([one[row] for one in STUDENT], [one[row] for one in TEACHER], k) for row in range(8)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    module, inputs = build_loss(
        KDSVD(layers=(("a", "b"), ("c", "d"), ("e", "f")), k=k),
        dict(zip("ace", STUDENT, strict=True)),
        dict(zip("bdf", TEACHER, strict=True)),
    )
    assert torch.equal(module(inputs), found)


def test_gradients_match_finite_differences():
    maps = STUDENT[0][:2].clone().requires_grad_()
    student, teacher = [one[:2] for one in STUDENT], [one[:2] for one in TEACHER]
    assert torch.autograd.gradcheck(lambda x: kdsvd_loss([x, *student[1:]], teacher), maps)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_maps_of_rank_one_and_zero_have_finite_gradients(value):
    maps = torch.full((1, 3, 2, 2), value, requires_grad=True)
    loss = kdsvd_loss([maps, maps], [one[:1, :3].float() for one in TEACHER[:2]])
    loss.sum().backward()
    assert loss.isfinite().all() and loss.dtype == torch.float32
    assert maps.grad.isfinite().all()


def test_half_precision_is_computed_in_wider():
    student, teacher = ([one.half() for one in some] for some in (STUDENT, TEACHER))
    exact = kdsvd_loss([one.double() for one in student], [one.double() for one in teacher])
    found = kdsvd_loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)
    assert kdsvd_loss(teacher, teacher).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("layers", "fault"),
    [((("a", "b"),), "give two or more pairs"), ((("a", "b"), ("c", "d")), "same number of channels")],
)
def test_one_pair_and_other_widths_are_refused(layers, fault):
    shapes = {"a": (3, 4, 4), "c": (5, 2, 2)}, {FeatureSpec("b"): (3, 4, 4), FeatureSpec("d"): (6, 2, 2)}
    with pytest.raises(RecipeError, match=fault):
        KDSVD(layers=layers).build(*shapes, DATASET)
