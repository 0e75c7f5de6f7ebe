"""Combined targets of peers against the formulas written a second time, in float64, and a convex solver."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from kdpipe.stages.cohort.combine import average, combine, general_weights, linear_weights, min_logit, naive


def logits_of(num_members, num_samples, num_classes, scale, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((num_members, num_samples, num_classes))
    return torch.from_numpy(logits), torch.from_numpy(rng.integers(num_classes, size=num_samples))


def test_naive_takes_the_least_cross_entropy():
    logits, labels = logits_of(3, 20, 5, 3.0)
    losses = -log_softmax(logits.numpy(), axis=2)[:, np.arange(20), labels.numpy()]
    wanted = logits.numpy()[losses.argmin(0), np.arange(20)]
    assert len(set(losses.argmin(0))) == 3
    np.testing.assert_array_equal(naive(logits, labels).numpy(), wanted)


def test_min_logit_is_the_minimum_after_the_shift():
    logits, labels = logits_of(3, 20, 5, 3.0)
    shifted = logits.numpy() - logits.numpy()[:, np.arange(20), labels.numpy()][:, :, None]
    found = min_logit(logits, labels)
    np.testing.assert_array_equal(found.numpy(), shifted.min(0))
    assert (found[torch.arange(20), labels] == 0).all()


def least_cross_entropy(logits, label):
    """The lowest cross entropy of a convex mixture of logits [K, C], by scipy from several starts."""

    def loss(weights):
        mixed = weights @ logits
        return logsumexp(mixed) - mixed[label]

    def gradient(weights):
        return logits @ (softmax(weights @ logits) - np.eye(logits.shape[1])[label])

    num = len(logits)
    starts = [np.full(num, 1 / num), *(0.9 * np.eye(num) + 0.1 / num)]
    total = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(num)}
    options = {"ftol": 1e-14, "maxiter": 500}
    found = [
        minimize(
            loss, start, jac=gradient, bounds=[(0, 1)] * num, constraints=total, method="SLSQP", options=options
        ).fun
        for start in starts
    ]
    return min(found)


@pytest.mark.parametrize("num_members", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_linear_weights_match_a_convex_solver(num_members, scale):
    logits, labels = logits_of(num_members, 12, 10, scale)
    weights = linear_weights(logits, labels)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(12, dtype=torch.float64))
    mixed = torch.einsum("kb,kbc->bc", weights, logits)
    found = torch.nn.functional.cross_entropy(mixed, labels, reduction="none").numpy()
    wanted = [least_cross_entropy(logits[:, n].numpy(), int(labels[n])) for n in range(12)]
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-6)


def test_linear_weights_of_two_members_by_a_fine_grid():
    logits, labels = logits_of(2, 6, 4, 2.0)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for n in range(6):
        mixed = grid[:, None] * logits[0, n] + (1 - grid[:, None]) * logits[1, n]
        best = grid[torch.nn.functional.cross_entropy(mixed, labels[n].expand(20001), reduction="none").argmin()]
        assert float(linear_weights(logits, labels)[0, n]) == pytest.approx(float(best), abs=2e-4)


def test_linear_weights_of_equal_members_are_equal():
    logits = torch.randn(1, 4, 3).expand(3, -1, -1)
    torch.testing.assert_close(linear_weights(logits, torch.tensor([0, 1, 2, 0])), torch.full((3, 4), 1 / 3).double())


def test_general_weights_minimize_the_squared_error():
    logits, labels = logits_of(3, 200, 5, 2.0)
    logits[0, torch.arange(200), labels] += 3  # one is better
    probabilities = logits.softmax(2)
    found = general_weights(probabilities, labels).numpy()

    def error(weights):
        mixed = np.einsum("k,knc->nc", weights, probabilities.numpy())
        return ((mixed - np.eye(5)[labels.numpy()]) ** 2).sum() / 200

    total = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    wanted = minimize(error, np.full(3, 1 / 3), constraints=total, options={"ftol": 1e-15}).x
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found[0] == found.max()


def test_general_combines_by_its_weights():
    logits, labels = logits_of(2, 4, 3, 1.0)
    weights = torch.tensor([1.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(combine("general", logits, labels, weights), 1.5 * logits[0] - 0.5 * logits[1])


@pytest.mark.parametrize("temperature", [1.0, 3.0, 50.0])
def test_average_is_the_mean_of_softmaxes(temperature):
    logits, _ = logits_of(3, 10, 5, 4.0)
    wanted = softmax(logits.numpy() / temperature, axis=2).mean(0)
    found = softmax(average(logits, temperature).numpy() / temperature, axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("how", ["naive", "linear", "min_logit", "general"])
def test_extreme_logits_stay_finite(how):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    target = combine(how, logits, torch.tensor([2]), torch.tensor([0.5, 0.5]))
    assert target.isfinite().all()
    assert target.dtype == torch.float32
