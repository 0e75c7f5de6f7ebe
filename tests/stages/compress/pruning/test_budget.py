"""Tests of pruning to a budget of the whole network."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, NETS, Residual, build
from torch import nn

from kdpipe.stages.compress.pruning.budget import MAX_LATENCIES, Allocation, Unreachable, find_ratio
from kdpipe.stages.compress.pruning.channel_groups import find_channels, remove, traceable, widths_after
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.importance import measure_of
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import record_widths
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.weights.state_dict import count_parameters


def macs(model: nn.Module) -> int:
    return count_macs(model, IMAGE_SHAPE)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("of", "size"), [("parameters", count_parameters), ("macs", macs)])
def test_budget_is_met_with_the_lowest_ratio(name, scope, of, size):
    model = build(name)
    config = PruneConfig(ratio=0.6, budget=of, scope=scope, round_to=1)
    pruned = prune(model, EXAMPLE, config)
    assert size(pruned.model) <= 0.4 * size(model)
    less = prune(model, EXAMPLE, config, ratio=pruned.ratio - 0.001).model
    assert size(less) > 0.4 * size(model)


class ValueDependent(Residual):
    """A network whose forward reads values, so that shapes alone do not determine its MACs."""

    def forward(self, x):
        return super().forward(x / 2 if float(x.amax()) > 100 else x)


def test_macs_budget_with_value_dependent_forward():
    model = ValueDependent()
    pruned = prune(model, EXAMPLE, PruneConfig(ratio=0.6, budget="macs", round_to=1)).model
    assert 0.3 < macs(pruned) / macs(model) <= 0.4


def test_found_ratio_prunes_the_same_without_search():
    model = build("residual")
    config = PruneConfig(ratio=0.5, budget="latency", round_to=1)
    found = prune(model, EXAMPLE, config, latency=lambda candidate: macs(candidate) / macs(model))
    again = prune(model, EXAMPLE, config, ratio=found.ratio)
    assert again.ratio == found.ratio
    assert record_widths(again.model) == record_widths(found.model) != record_widths(model)


def test_latency_is_measured_once_per_widths():
    model = build("residual")
    tried = []

    def latency(candidate: nn.Module) -> float:
        assert candidate.eval()(EXAMPLE).shape == (1, 5)
        tried.append(record_widths(candidate))
        return macs(candidate) / macs(model)

    pruned = prune(model, EXAMPLE, PruneConfig(ratio=0.5, budget="latency", round_to=1), latency=latency).model
    assert 3 <= len(tried) <= MAX_LATENCIES
    assert all(widths not in tried[:place] for place, widths in enumerate(tried))
    assert record_widths(pruned) in tried
    assert macs(pruned) <= 0.5 * macs(model)


def test_noisy_search_takes_the_largest_that_fits():
    shares = {(4,): 1.0, (3,): 0.45, (2,): 0.5, (1,): 0.2}  # the third was slow that once
    widths = lambda ratio: (4 - int(ratio * 3.5),)  # noqa: E731
    ratio = find_ratio(widths, shares.__getitem__, 0.5, highest=1.0)
    assert shares[widths(ratio)] <= 0.5


def test_met_goal_removes_nothing():
    assert find_ratio(lambda ratio: (round(10 - 9 * ratio),), lambda widths: widths[0] / 20, 0.5, highest=1.0) == 0


def test_unreachable_goal_ends_the_search():
    with pytest.raises(Unreachable):
        find_ratio(lambda ratio: (round(10 - 5 * ratio),), lambda widths: widths[0] / 10, 0.4, highest=1.0)


@pytest.mark.parametrize("name", NETS)
def test_widths_after_matches_actual_pruning(name):
    model = build(name)
    before = record_widths(model)
    with traceable(model):
        found = find_channels(model, EXAMPLE, (), measure_of("l1"), full_widths=before, with_batch_norm=False)
        num_kept = Allocation("layer", 0.9, 1).num_kept(found.groups, 0.37)
        expected = widths_after(before, found.groups, num_kept)
        remove(found, num_kept)
    assert record_widths(model) == expected != before


def test_unreachable_budget_error_states_the_minimum():
    with pytest.raises(
        ModelError, match=r"cannot leave 2\.0% of this model's parameters.* [\d.]+% is the least; lower"
    ):
        prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.98, budget="parameters"))


def test_latency_budget_needs_a_measure():
    with pytest.raises(ModelError, match="needs the `latency` argument"):
        prune(build("residual"), EXAMPLE, PruneConfig(budget="latency"))


@pytest.mark.parametrize(("scope", "of"), [("layer", "channels"), ("layer", "parameters"), ("global", "macs")])
def test_steps_end_at_the_one_shot_widths(scope, of):
    full = build("residual")
    config = PruneConfig(ratio=0.6, budget=of, scope=scope, round_to=4, steps=3)
    model = full
    sizes = []
    for step in range(3):
        model = prune(model, EXAMPLE, config, full=full, done=(step + 1) / 3).model
        sizes.append(count_parameters(model))
        with torch.no_grad():  # what fine-tuning between the steps may do
            for parameter in model.parameters():
                parameter.mul_(1.1)
    at_once = prune(full, EXAMPLE, config).model
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    if scope == "layer":
        assert record_widths(model) == record_widths(at_once)
    assert macs(model) <= 0.4 * macs(full) or of != "macs"


def test_step_without_effect_is_no_error():
    model = build("residual")
    first = prune(model, EXAMPLE, PruneConfig(ratio=0.5), full=model, done=0.1)
    assert record_widths(first.model) == record_widths(model)
    assert first.ratio == pytest.approx(0.05)
