"""Tests of pruning in depth: the order of removal, and budgets."""

import itertools
import json

import pytest
import torch
from support.tiny_nets import NUM_CLASSES, sgd
from torch import nn
from torch.nn import functional as F

from kdpipe.stages.compress.prune_student import ranking_losses
from kdpipe.stages.compress.pruning.blocks import skip_blocks, skipped_paths
from kdpipe.stages.compress.pruning.budget import MAX_LATENCIES
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Ranker, rank_blocks
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.data.tasks import CLASSIFICATION, EMBEDDING, REGRESSION
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.weights.state_dict import count_parameters

SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(2, *SHAPE)
BLOCKS = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


def resnet20():
    return build_model(ModelConfig(name="resnet20"), num_classes=NUM_CLASSES, in_channels=3, image_size=(8, 8), seed=0)


def pruned(model, *, harm=lambda model: 0.0, **settings):
    full = settings.pop("full", None)
    rest = {key: settings.pop(key) for key in ("latency", "done") if key in settings}
    return prune(model, EXAMPLE, PruneConfig(**settings), full=full, ranker=Ranker(harm), **rest)


def gone(model):
    return set(skipped_paths(model))


def share_of_macs(model, full):
    return count_macs(model, SHAPE) / count_macs(full, SHAPE)


def test_order_is_that_of_measuring_all_in_each_round():
    values, measured = dict(zip(BLOCKS, (5.0, 1.0, 4.0, 3.0, 9.0, 2.0, 6.0), strict=True)), []

    def harm(model):  # pairs in a stage do more harm than both alone
        lost = gone(model)
        measured.append(lost)
        pairs = sum(first[:6] == second[:6] for first, second in itertools.combinations(lost, 2))
        return sum(values[path] for path in lost) + 10 * pairs

    model = resnet20()
    found = list(rank_blocks(model, [(path,) for path in BLOCKS], Ranker(harm), 5))
    lost = []
    for block, worth in found:
        rest = [path for path in BLOCKS if path not in lost]
        harms = {path: harm(skip_blocks(resnet20(), [*lost, path])) for path in rest}
        assert block == (min(harms, key=harms.get),) and worth == min(harms.values())
        lost += block
    assert len([one for one in measured if len(one) == 1]) == 2 * len(BLOCKS)  # once here, once in the check
    assert not gone(model)


def test_blocks_without_which_logits_stay_are_removed():
    model, batch = resnet20().eval(), torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    idle = ["layer1.2", "layer2.1", "layer3.2"]
    with torch.no_grad():
        for path in idle:
            model.get_submodule(path).bn2.weight.zero_()
        logits = model(batch)

    @torch.no_grad()
    def harm(cut):
        return float((cut.eval()(batch) - logits).abs().sum())

    found = pruned(model, kind="blocks", ratio=3 / 7, harm=harm)
    assert skipped_paths(found.model) == idle and found.ratio == 3 / 7
    assert [path for path, _ in found.ranking] == idle and all(harm == 0 for _, harm in found.ranking)
    assert not gone(model)


def test_not_a_number_is_the_greatest_harm():
    def harm(cut):
        return float("nan") if "layer1.0" in gone(cut) else 1.0

    found = pruned(resnet20(), kind="blocks", ratio=0.8, harm=harm)
    assert gone(found.model) == set(BLOCKS[1:])


@pytest.mark.parametrize("budget", ["macs", "parameters", "latency"])
def test_budget_is_met_with_the_fewest_blocks(budget):
    model, measured = resnet20(), []

    def size(candidate):
        return count_macs(candidate, SHAPE) if budget == "macs" else count_parameters(candidate)

    def latency(candidate):
        measured.append(candidate)
        return size(candidate) / size(model)

    found = pruned(model, kind="blocks", budget=budget, ratio=0.4, latency=latency)
    assert size(found.model) <= 0.6 * size(model)
    assert gone(found.model) == set(BLOCKS[: len(gone(found.model))])  # of equal harm, the first
    one_less = skip_blocks(resnet20(), BLOCKS[: len(gone(found.model)) - 1])
    assert size(one_less) > 0.6 * size(model) and len(measured) <= MAX_LATENCIES


def test_steps_end_at_the_one_shot_blocks():
    model, at_once = resnet20(), pruned(resnet20(), kind="blocks", ratio=0.6)
    first = pruned(model, kind="blocks", ratio=0.6, steps=2, done=0.5)
    second = pruned(first.model, kind="blocks", ratio=0.6, steps=2, full=model)
    assert 0 < len(gone(first.model)) < len(gone(second.model))
    assert gone(second.model) == gone(at_once.model) and second.ratio == at_once.ratio
    assert [*first.ranking, *second.ranking] == at_once.ranking


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.05}, "removes no block of this model: raise compress.prune.ratio"),
        ({"ratio": 0.95}, r"95% of this model's 7 blocks is impossible while prune.max_ratio lets it lose 90%"),
        ({"budget": "macs", "ratio": 0.9}, r"cannot leave 10.0% of this model's macs: without 6 of them it is [23]"),
        ({"exclude": ("layer1", "layer2", "layer3")}, r"layer1.0: named in prune.exclude"),
        ({"exclude": ("layer7",)}, "the model has no module 'layer7'"),
    ],
)
def test_what_cannot_be_removed_is_an_error(settings, message):
    with pytest.raises(ModelError, match=message):
        pruned(resnet20(), kind="blocks", **settings)


def test_network_without_blocks_is_an_error():
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, NUM_CLASSES))
    with pytest.raises(ModelError, match="none gives an output of its input's shape"):
        pruned(flat, kind="blocks")


def test_depth_and_width_share_a_budget_and_are_rebuilt():
    model, config = resnet20(), PruneConfig(kind="blocks+channels", budget="macs", ratio=0.6, round_to=1)
    depth, width = config.parts
    assert depth.ratio == pytest.approx(1 - 0.4**0.5) and width.ratio == 0.6
    shallow = prune(model, EXAMPLE, depth, ranker=Ranker(lambda cut: 0.0)).model
    assert 0.4 < share_of_macs(shallow, model) <= 0.4**0.5
    small = prune(shallow, EXAMPLE, width, full=model).model
    assert 0.3 < share_of_macs(small, model) <= 0.4 and gone(small) == gone(shallow)
    optimizer = sgd(small)
    F.cross_entropy(small.train()(torch.rand(4, *SHAPE)), torch.arange(4)).backward()
    optimizer.step()
    record = json.loads(json.dumps([skipped_paths(small), record_widths(small)]))
    again = apply_widths(skip_blocks(resnet20(), record[0]), record[1])
    again.load_state_dict(small.state_dict(), strict=True)
    batch = torch.rand(2, *SHAPE)
    assert torch.equal(again.eval()(batch), small.eval()(batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "blocks"}, 'needs kind = "blocks"'),
        ({"kind": "blocks", "budget": "channels"}, "blocks leave as blocks"),
        ({"kind": "blocks", "importance": "l2"}, "leave out importance, scope and heads"),
        ({"kind": "blocks", "heads": True}, "leave out importance, scope and heads"),
        ({"kind": "blocks+channels"}, "needs a budget of both"),
    ],
)
def test_contradictory_settings_are_errors(settings, message):
    with pytest.raises(RecipeError, match=message):
        PruneConfig(**settings)


def test_recipe_without_a_loss_on_logits_is_refused():
    losses = [Hint(loss="hint", layers=[["stage1", "stage1"]])]
    for task in (REGRESSION, EMBEDDING):
        with pytest.raises(ModelError, match=f"this recipe for {task} has none: add one to distill"):
            ranking_losses(task, losses)
    assert ranking_losses(CLASSIFICATION, losses)[0].loss == "kd"
