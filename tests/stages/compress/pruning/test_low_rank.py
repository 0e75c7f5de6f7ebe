"""Tests of factoring layers: their values, the choice of ranks, budgets and records."""

import itertools
import json

import pytest
import torch
from support.tiny_nets import IMAGE_SHAPE, NUM_CLASSES, Residual, sgd
from torch import nn
from torch.nn import functional as F

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Ranker
from kdpipe.stages.compress.pruning.low_rank import LowRank, dense, ranks_of, set_ranks
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.ranks import Factorable, rank_steps
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.weights.state_dict import count_parameters

EXAMPLE = torch.zeros(2, *IMAGE_SHAPE)
LAYERS = {
    "linear": (nn.Linear(12, 9), (5, 7, 12)),
    "no bias": (nn.Linear(12, 9, bias=False), (50, 12)),
    "1 x 1": (nn.Conv2d(8, 12, 1), (3, 8, 5, 5)),
    "tall": (nn.Conv2d(1, 24, 3), (3, 1, 8, 8)),
    "strided, dilated": (nn.Conv2d(6, 12, (3, 2), (2, 1), (1, 2), (2, 1), bias=False), (3, 6, 11, 9)),
    "circular": (nn.Conv2d(6, 12, 3, padding=1, padding_mode="circular"), (3, 6, 7, 7)),
    "same": (nn.Conv2d(6, 12, 3, padding="same"), (3, 6, 7, 7)),
}


def each_layer():
    return pytest.mark.parametrize("name", LAYERS)


def layer_of(name):
    layer, shape = LAYERS[name]
    return layer, torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def factorable(layer):
    return Factorable("layer", layer, [1], None, 1)


def rows_of(outputs, layer):
    return (outputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else outputs).flatten(0, -2).detach().double()


@each_layer()
@pytest.mark.parametrize("observed", [False, True])
@torch.no_grad()
def test_full_rank_computes_the_layer(name, observed):
    layer, inputs = layer_of(name)
    found = factorable(layer)
    if observed:
        found.observe(layer(inputs))
    two = found.at(len(layer.weight))
    torch.testing.assert_close(two(inputs), layer(inputs), atol=1e-5, rtol=1e-5)
    assert (two[1].bias is None) == (layer.bias is None)


@each_layer()
@torch.no_grad()
def test_without_outputs_it_is_the_truncated_svd(name):
    layer, inputs = layer_of(name)
    two = factorable(layer).at(4)
    merged = dense(two)
    singular = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
    error = (merged.weight - layer.weight).double().norm()
    torch.testing.assert_close(error, singular[4:].norm(), atol=1e-5, rtol=1e-5)
    assert two.rank == 4 and sum(p.numel() for p in two.parameters()) == sum(
        part.weight.numel() + (0 if part.bias is None else part.bias.numel()) for part in two
    )
    # In each component both layers have the same norm.
    torch.testing.assert_close(two[0].weight.flatten(1).norm(dim=1), two[1].weight.flatten(1).norm(dim=0))
    torch.testing.assert_close(merged(inputs), two(inputs), atol=1e-5, rtol=1e-5)


@each_layer()
@torch.no_grad()
def test_no_other_layers_of_the_rank_are_nearer_to_the_outputs(name):
    layer, inputs = layer_of(name)
    found, outputs = factorable(layer), layer(inputs)
    for part in inputs.split(2):
        found.observe(layer(part))
    error = (rows_of(found.at(3)(inputs), layer) - rows_of(outputs, layer)).square().sum()
    rows = rows_of(outputs, layer)
    if layer.bias is not None:
        rows = rows - rows.mean(0)
    least = torch.linalg.svdvals(rows)[3:].square().sum()
    torch.testing.assert_close(error, least, atol=1e-6, rtol=1e-3)
    plain = (rows_of(factorable(layer).at(3)(inputs), layer) - rows_of(outputs, layer)).square().sum()
    assert error <= plain * 1.001 + 1e-6


def residual():
    torch.manual_seed(0)
    return Residual()


def pruned(model, *, harm=lambda model: 0.0, **settings):
    rest = {key: settings.pop(key) for key in ("latency", "done", "full", "ratio_found") if key in settings}
    if "ratio_found" in rest:
        rest["ratio"] = rest.pop("ratio_found")
    return prune(model, EXAMPLE, PruneConfig(kind="low-rank", **settings), ranker=Ranker(harm), **rest)


def distance_from(model):
    batch = torch.rand(16, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))
    logits = model.eval()(batch).detach()

    @torch.no_grad()
    def harm(candidate):
        return float((candidate.eval()(batch) - logits).square().mean())

    return harm


def size_of(model, budget):
    return count_macs(model, IMAGE_SHAPE) if budget == "macs" else count_parameters(model)


def test_order_is_that_of_measuring_all_in_each_round():
    model, costs = residual(), {"layer1.0.conv1": 3.0, "layer1.1.conv1": 1.0, "layer2.0.conv2": 2.0}
    levels = {path: [9, 6, 3] if path < "layer2" else [16, 8] for path in costs}

    def harm_of(ranks):  # each level is worse than the one above, and two layers together than both alone
        harms = [costs[path] * (1 + levels[path].index(rank)) ** 2 for path, rank in ranks.items()]
        return sum(harms) + 0.5 * sum(first * second for first, second in itertools.combinations(harms, 2))

    layers = [Factorable(path, model.get_submodule(path), levels[path], None, 1) for path in costs]
    steps = list(rank_steps(model, layers, Ranker(lambda cut: harm_of(ranks_of(cut))), 10**9))
    now, left = {}, {path: list(ranks) for path, ranks in levels.items()}
    for step in steps:
        scores = {
            layer.path: (harm_of(now | {layer.path: left[layer.path][0]}) - harm_of(now))
            / layer.saving(left[layer.path][0], now.get(layer.path))
            for layer in layers
            if left[layer.path]
        }
        assert step.path == min(scores, key=scores.get) and step.rank == left[step.path].pop(0)
        now[step.path] = step.rank
        assert step.harm == harm_of(now)
    assert not any(left.values()) and not ranks_of(model)


def test_a_layer_of_low_rank_goes_first_and_logits_stay():
    model = residual()
    with torch.no_grad():
        weight = model.layer2[0].conv2.weight
        low = torch.randn(24, 3) @ torch.randn(3, 24 * 9)
        weight.copy_((low * weight.norm() / low.norm()).view_as(weight))
    found = pruned(model, harm=distance_from(model), ratio=0.25, round_to=4)
    assert found.ranks[0].path == "layer2.0.conv2" and ranks_of(found.model)["layer2.0.conv2"] == 4
    assert found.ranks[0].harm < 1e-9 and not ranks_of(model)
    assert found.excluded["fc"] == "it writes the logits" and "shortcut" not in str(ranks_of(found.model))


@pytest.mark.parametrize("budget", ["parameters", "macs", "latency"])
def test_budget_is_met_and_counted(budget):
    model = residual()
    counted = "parameters" if budget == "parameters" else "macs"
    latency = lambda cut: size_of(cut, "macs") / size_of(model, "macs")  # noqa: E731
    found = pruned(model, harm=distance_from(model), budget=budget, ratio=0.4, round_to=2, latency=latency)
    share = size_of(found.model, counted) / size_of(model, counted)
    assert 0.45 < share <= 0.6 and found.ratio == pytest.approx(1 - share)
    again = pruned(model, harm=distance_from(model), budget=budget, ratio=0.4, round_to=2, ratio_found=found.ratio)
    assert ranks_of(again.model) == ranks_of(found.model) and again.ranks == found.ranks
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name])
    assert all(layer.rank % 2 == 0 for layer in found.model.modules() if isinstance(layer, LowRank))
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_steps_lower_what_is_factored_already():
    model = residual()
    harm = distance_from(model)
    first = pruned(model, harm=harm, ratio=0.6, round_to=1, done=0.5)
    second = pruned(first.model, harm=harm, ratio=0.6, round_to=1, full=model)
    before, after = ranks_of(first.model), ranks_of(second.model)
    assert size_of(first.model, "parameters") <= 0.7 * size_of(model, "parameters")
    assert size_of(second.model, "parameters") <= 0.4 * size_of(model, "parameters")
    assert before.keys() <= after.keys() and any(after[path] < rank for path, rank in before.items())
    assert all(after[path] <= rank for path, rank in before.items())


def test_a_factored_model_is_factored_again():
    model = residual()
    harm = distance_from(model)
    low = pruned(model, harm=harm, ratio=0.3, round_to=1).model
    lower = pruned(low, harm=harm, ratio=0.3, round_to=1).model
    assert size_of(lower, "parameters") <= 0.7 * size_of(low, "parameters")
    again = set_ranks(set_ranks(residual(), ranks_of(low)), ranks_of(lower))
    again.load_state_dict(lower.state_dict(), strict=True)
    assert torch.equal(again.eval()(EXAMPLE + 1), lower.eval()(EXAMPLE + 1))


def test_a_model_is_rebuilt_from_its_record_and_trains():
    model = residual()
    small = pruned(model, harm=distance_from(model), ratio=0.5, round_to=1).model
    optimizer = sgd(small)
    F.cross_entropy(small.train()(torch.rand(4, *IMAGE_SHAPE)), torch.arange(4)).backward()
    optimizer.step()
    record = json.loads(json.dumps(ranks_of(small)))
    state = torch.get_rng_state()
    again = set_ranks(residual(), record)
    again.load_state_dict(small.state_dict(), strict=True)
    batch = torch.rand(2, *IMAGE_SHAPE)
    assert torch.equal(again.eval()(batch), small.eval()(batch))
    torch.set_rng_state(state)
    set_ranks(model, record)
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers are drawn


def test_channels_are_pruned_after_it_and_rebuilt():
    model = residual()
    low = pruned(model, harm=distance_from(model), ratio=0.3, round_to=1).model
    small = prune(low, EXAMPLE, PruneConfig(ratio=0.3, round_to=1)).model
    again = apply_widths(set_ranks(residual(), ranks_of(small)), record_widths(small))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again.eval()(EXAMPLE + 1), small.eval()(EXAMPLE + 1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "the record of ranks is a list"),
        ({"layer9": 1}, "'layer9' is no layer to factor"),
        ({"": 1}, "'' is no layer to factor"),
        ({"layer1": 1}, "'layer1' is no layer to factor"),
        ({"fc": 0}, "gives 'fc' the rank 0; expected a whole number, at least 1 and at most 4"),
        ({"fc": 5}, "rank 5"),
        ({"layer2.0.conv2": 10**9}, "rank 1000000000"),
        ({"fc": True}, "rank True"),
        ({"fc": 1, "stem.0": "2"}, "rank 2"),
    ],
)
def test_records_of_other_networks_are_errors_and_change_nothing(record, message):
    model = residual()
    with pytest.raises(ModelError, match=message):
        set_ranks(model, record)
    assert not ranks_of(model)


class Awkward(nn.Module):
    """Layers that cannot be factored, one of each kind, and one that can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.read = nn.Linear(32, 32)
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.idle = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.plain = nn.Linear(32, 32)
        self.small = nn.Linear(32, 4)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = self.grouped(self.stem(x)).mean(dim=(2, 3))
        x = F.linear(x, self.read.weight)
        x = self.again(self.shared(x)) + self.attention(x, x, x)[0]
        return self.head(self.small(self.plain(x)))


def test_layers_that_stay_are_named_with_the_reason():
    found = pruned(Awkward(), ratio=0.05)
    reasons = {
        "grouped": "computes in groups",
        "read": "does not call it",
        "shared": "used under several paths",
        "idle": "does not call it",
        "attention.out_proj": "no plain layer",
        "small": "it is too small: no rank that is a multiple of prune.round_to (8)",
        "head": "writes the logits",
    }
    assert set(reasons) == set(found.excluded) and set(ranks_of(found.model)) <= {"stem", "plain"}
    for path, reason in reasons.items():
        assert reason in found.excluded[path], path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_to": 32}, r"no layer of this model can be factored \(stem.0: it is too small: no rank that is a mul"),
        ({"exclude": ("stem", "layer1", "layer2")}, r"stem.0: named in prune.exclude"),
        ({"exclude": ("layer7",)}, "the model has no module 'layer7'"),
        ({"budget": "macs", "ratio": 0.95}, r"cannot leave 5.0% of this model's macs: with the lowest .* it is \d"),
        ({"budget": "latency", "latency": lambda cut: 1.5}, r"cannot leave 50.0% of this model's latency.* 150.0%"),
        ({"budget": "latency", "latency": lambda cut: 0.4}, "factors no layer of this model: raise compress.prune"),
    ],
)
def test_what_cannot_be_done_is_an_error(settings, message):
    with pytest.raises(ModelError, match=message) as raised:
        pruned(residual(), **settings)
    assert "\n" not in str(raised.value)


def test_a_share_of_each_layer_stays():
    found = pruned(residual(), ratio=0.4, max_ratio=0.5, round_to=1)
    for path, rank in ranks_of(found.model).items():
        weight = residual().get_submodule(path).weight
        assert rank * (len(weight) + weight[0].numel()) >= 0.5 * weight.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "channels"}, 'needs a budget of "parameters", "macs" or "latency"'),
        ({"budget": "blocks"}, 'needs a budget of "parameters", "macs" or "latency"'),
        ({"importance": "l2"}, "leave out importance, scope and heads"),
        ({"scope": "global"}, "leave out importance, scope and heads"),
        ({"heads": True}, "leave out importance, scope and heads"),
    ],
)
def test_contradictory_settings_are_errors(settings, message):
    with pytest.raises(RecipeError, match=message):
        PruneConfig(kind="low-rank", **settings)
    assert PruneConfig(kind="low-rank").budget == "parameters"


def test_it_needs_a_ranker():
    with pytest.raises(ModelError, match='prune.kind = "low-rank" needs the `ranker` argument'):
        prune(residual(), EXAMPLE, PruneConfig(kind="low-rank"))


def test_not_a_number_is_the_greatest_harm():
    def harm(cut):
        return float("nan") if "stem.0" in ranks_of(cut) else 1.0

    assert "stem.0" not in ranks_of(pruned(residual(), ratio=0.5, round_to=1, harm=harm).model)
