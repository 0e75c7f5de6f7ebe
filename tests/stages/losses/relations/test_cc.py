"""CC: both forms against loop implementations, and training of the embeddings."""

import math

import pytest
import torch
from support.loss_inputs import STUDENT_MAPS, TEACHER_VECTORS, drawn, make_inputs

from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.relations.cc import CC, cc_loss, correlation_loss, correlations
from kdpipe.stages.targets.feature_spec import FeatureSpec

POOLED = FeatureSpec("b", "pooled")


def built(**keys):
    config = CC(loss="cc", layers=(("a", "b"),), **keys)
    torch.manual_seed(0)
    return config.build({"a": (16, 8, 8)}, {POOLED: (32,)}, DatasetInfo(100, 10))


def test_defaults_match_the_reference_code():
    config = CC(loss="cc", layers=(("a", "b"),))
    assert (config.weight, config.dim, config.variant, config.per_sample) == (0.02, 128, "code", False)
    assert (config.student_layers(), config.required_features({})) == (("a",), (POOLED,))


def test_the_codes_form_is_the_product_of_neighbors_errors():
    student, teacher = drawn(4, 3, seed=1), drawn(4, 3, seed=2)
    products = [abs(student[b] - teacher[b]) @ abs(student[b + 1] - teacher[b + 1]) for b in range(3)]
    assert cc_loss(student, teacher).item() == pytest.approx(float(sum(products)) / 3, rel=1e-12)


def test_the_papers_form_compares_expanded_kernels():
    student, teacher = drawn(3, 4, seed=1), drawn(3, 6, seed=2)

    def kernel(x, y):
        product = float(x @ y / (x.norm() * y.norm()))
        return math.exp(-0.8) * (1 + 0.8 * product + 0.32 * product**2)

    pairs = [(i, j) for i in range(3) for j in range(3)]
    apart = [(kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i, j in pairs]
    assert correlation_loss(student, teacher).item() == pytest.approx(sum(apart) / 9, rel=1e-12)


def test_the_expansion_is_near_the_gaussian_kernel():
    units = torch.nn.functional.normalize(drawn(5, 8, seed=1))
    exact = torch.exp(-0.4 * torch.cdist(units, units) ** 2)
    assert (correlations(units) - exact).abs().max() < 0.05


@pytest.mark.parametrize("loss", [cc_loss, correlation_loss])
def test_gradients_of_both_sides_equal_finite_differences(loss):
    student, teacher = drawn(3, 4, seed=1).requires_grad_(), drawn(3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("loss", [cc_loss, correlation_loss])
def test_student_equal_to_teacher_is_0_and_flat(loss):
    student = TEACHER_VECTORS.clone().requires_grad_()
    value = loss(student, TEACHER_VECTORS)
    value.backward()
    assert value.item() == 0
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("maps", [torch.ones(1, 16, 8, 8), torch.zeros(1, 16, 8, 8), torch.zeros(4, 16, 8, 8)])
def test_loss_and_gradient_are_finite_at_the_edges(maps, variant, dtype):
    module, student = built(variant=variant), maps.clone().to(dtype).requires_grad_()
    batch = make_inputs(student={"a": student}, teacher={POOLED: torch.zeros(len(maps), 32)})
    with torch.no_grad():  # zero rows of features give zero rows of embeddings
        for name, bias in module.named_parameters():
            bias.mul_(not name.endswith("bias"))
    loss = module(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(leaf.grad).all() for leaf in (student, *module.parameters()))


@pytest.mark.parametrize(("variant", "loss"), [("code", cc_loss), ("paper", correlation_loss)])
def test_both_sides_are_embedded_and_both_embeddings_train(variant, loss):
    module = built(variant=variant)
    value = module(make_inputs(student={"a": STUDENT_MAPS}, teacher={POOLED: TEACHER_VECTORS}))
    value.backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in module.named_parameters() if name.endswith("weight"))
    embedded = module.pairs[0].student(STUDENT_MAPS), module.pairs[0].teacher(TEACHER_VECTORS)
    assert embedded[0].shape == embedded[1].shape == (8, 128)
    assert value.item() == pytest.approx(loss(*embedded).item(), rel=1e-6)


def test_code_form_of_a_batch_of_one_is_zero():
    assert cc_loss(torch.ones(1, 4), torch.zeros(1, 4)).item() == 0
