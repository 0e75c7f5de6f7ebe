"""Bootstrap intervals: resampled measures are scikit-learn's with the counts as weights."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score

from kdpipe.stages.data.measures import mean_average_precision, r2
from kdpipe.stages.evaluation import bootstrap
from kdpipe.stages.evaluation.bootstrap import bootstrap_interval
from kdpipe.stages.evaluation.main_metric import MAP, R2


def drawn(num, seed=0):
    """Labels [N], some not known, with scores that have ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num).astype(float)
    scores = (labels + generator.normal(size=num)).round(1)
    labels[::7] = np.nan
    return labels, scores, generator.multinomial(num, np.full(num, 1 / num), size=5).astype(float)


def test_resampled_average_precision_is_that_of_weights():
    labels, scores, counts = drawn(60)
    known = ~np.isnan(labels)
    wanted = [average_precision_score(labels[known] == 1, scores[known], sample_weight=row[known]) for row in counts]
    assert bootstrap._average_precision(labels, scores)(counts) == pytest.approx(wanted)
    assert np.isnan(bootstrap._average_precision(np.zeros(4), np.arange(4.0))(np.ones((1, 4)))).all()


def test_resampled_r2_is_that_of_weights():
    labels, scores, counts = drawn(60)
    numbers, known = 5 + labels + scores / 2, ~np.isnan(labels)
    wanted = [r2_score(numbers[known], scores[known], sample_weight=row[known]) for row in counts]
    assert bootstrap._r2(numbers, scores)(counts) == pytest.approx(wanted)
    assert np.isnan(bootstrap._r2(np.ones(4), np.arange(4.0))(np.ones((1, 4)))).all()


@pytest.mark.parametrize("metric", [MAP, R2])
def test_intervals_hold_the_measure_and_shrink(metric):
    widths = []
    for num in (50, 800):
        labels, scores, _ = drawn(num)
        targets, outputs = (torch.from_numpy(np.stack([each, each], 1)) for each in (labels, scores))
        low, high = bootstrap_interval(metric, targets, outputs)
        value = mean_average_precision(targets, outputs)[0] if metric == MAP else r2(targets, outputs)
        assert low < value < high
        assert (low, high) == bootstrap_interval(metric, targets, outputs)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert bootstrap_interval(metric, targets[:1], outputs[:1]) is None
