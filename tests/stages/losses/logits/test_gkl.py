"""GKL against the authors' formula over all pairs of classes, and its class weights, in float64."""

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, drawn, make_inputs

from kdpipe.stages.losses.logits.gkl import GKL, gkl_loss
from kdpipe.stages.losses.schedules import TrainProgress


def formula(student, teacher, weights, temperature, alpha, beta):
    """Return the loss with one term for each sample and pair of classes."""
    total, norm, entropy = 0.0, 0.0, 0.0
    for s, t, w in zip(student, teacher, weights, strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                pair = (w[i] * w[j]).item()
                total += pair * ((t[i] - t[j]) - (s[i] - s[j])).item() ** 2
                norm += pair
        entropy -= ((t / temperature).softmax(0) * (s / temperature).softmax(0).log()).sum().item() / len(student)
    return beta * 0.25 * total / norm + alpha * entropy


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(4.0, 1.0, 16.0), (1.0, 0.0, 1.0), (2.0, 3.0, 0.0)])
def test_values_are_those_of_the_formula(temperature, alpha, beta):
    weights = drawn(8, 10, seed=31).softmax(1) ** 0.3
    found = gkl_loss(STUDENT_LOGITS, TEACHER_LOGITS, weights, temperature, alpha=alpha, beta=beta)
    expected = formula(STUDENT_LOGITS, TEACHER_LOGITS, weights, temperature, alpha, beta)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_weights_are_the_class_means_of_the_epoch_before():
    config = GKL(gamma=0.5, weight_temperature=2.0, warmup_epochs=0)
    module, labels = config.build({}, {}, DATASET).double(), torch.tensor([0, 0, 1, 1, 1, 2, 2, 9])
    batches = [drawn(8, 10, seed=40 + number) for number in range(4)]

    def run(number, epoch):
        inputs = make_inputs(STUDENT_LOGITS, batches[number], labels=labels, progress=TrainProgress(epoch, 3))
        return module(inputs).item()

    def expected(number, weights):
        return gkl_loss(STUDENT_LOGITS, batches[number], weights[labels] ** 0.5).item()

    uniform = torch.full((10, 10), 0.1, dtype=torch.float64)
    assert [run(0, 0), run(1, 0)] == pytest.approx([expected(0, uniform), expected(1, uniform)])
    rows = torch.cat(batches[:2]).div(2).softmax(1)
    means = [rows[torch.cat([labels, labels]) == label].mean(0) for label in (0, 1, 2, 9)]
    weights = uniform.clone()
    weights[[0, 1, 2, 9]] = torch.stack(means)
    assert [run(2, 1), run(3, 1)] == pytest.approx([expected(2, weights), expected(3, weights)])
    assert run(0, 1) != pytest.approx(expected(0, uniform))
    assert set(module.state_dict()) == {"weights", "sums", "epoch"}


def test_defaults_and_warm_up():
    config = GKL()
    assert (config.alpha, config.beta, config.gamma, config.temperature) == (1.0, 16.0, 0.05, 4.0)
    assert (config.weight, config.weight_temperature, config.warmup_epochs) == (1.0, 4.0, 20)
    module = config.build({}, {}, DATASET).double()
    part = module(make_inputs(progress=TrainProgress(4, 240)))  # the fifth of 20 epochs
    whole = config.build({}, {}, DATASET).double()(make_inputs())
    assert part.item() == pytest.approx(whole.item() / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_logits_match_float64(dtype):
    ends = torch.tensor([[300.0, -300, 0, 150]], dtype=dtype)
    weights = torch.full((1, 4), 0.25)
    exact = gkl_loss(ends.double(), ends.flip(1).double(), weights.double())
    assert gkl_loss(ends, ends.flip(1), weights).item() == pytest.approx(exact.item(), rel=1e-5)


def test_gradients_match_finite_differences():
    weights = drawn(8, 10, seed=31).softmax(1)
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gkl_loss(z, TEACHER_LOGITS, weights), logits)
