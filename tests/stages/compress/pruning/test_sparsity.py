"""Tests of unstructured pruning and its masks."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, NETS, UNPRUNABLE, build, sgd, step
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.sparsity import apply_masks, masks_of
from kdpipe.stages.compress.pruning.widths import record_widths
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.main_logits import keep_main_logits


def zeros_of(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros by layer, of those that have some."""
    return {path: 1 - float(mask.float().mean()) for path, mask in masks_of(model).items()}


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
@pytest.mark.parametrize("config", [PruneConfig(kind="weights", ratio=0.75), PruneConfig(kind="2:4")])
def test_share_of_zeros_and_nothing_else_changes(name, config):
    model = build(name)
    pruned = prune(model, EXAMPLE, config)
    shares = zeros_of(pruned.model)
    assert shares and all(share == pytest.approx(config.ratio, abs=0.01) for share in shares.values())
    assert record_widths(pruned.model) == record_widths(model)
    masks = masks_of(pruned.model)
    for path, before in model.state_dict().items():
        expected = before * masks[path] if path in masks else before
        assert torch.equal(pruned.model.state_dict()[path], expected)


def test_smallest_weights_of_a_layer_are_zeroed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.randperm(768).view(4, 192) - 300.5)
    weight = prune(model, EXAMPLE, PruneConfig(kind="weights", ratio=0.25)).model[1].weight
    assert torch.equal(weight != 0, model[1].weight.abs() > 96)


def test_global_weight_pruning_respects_max_ratio():
    model = build("plain")
    with torch.no_grad():
        model.stage2[0].weight.mul_(1e-3)
    pruned = prune(model, EXAMPLE, PruneConfig(kind="weights", ratio=0.5, scope="global", max_ratio=0.8)).model
    shares = zeros_of(pruned)
    assert shares["stage2.0.weight"] == pytest.approx(0.8, abs=0.001)
    layers = (model.stage1[0], model.stage2[0], model.hidden[0])
    num_weights = sum(layer.weight.numel() for layer in layers)
    num_zeros = sum(int((~mask).sum()) for mask in masks_of(pruned).values())
    assert num_zeros == round(0.5 * num_weights)


def test_global_share_beyond_max_ratio_is_an_error():
    with pytest.raises(ModelError, match=r"zeroing 95% .* prune\.max_ratio"):
        prune(build("plain"), EXAMPLE, PruneConfig(kind="weights", ratio=0.95, scope="global"))


def test_2_4_keeps_the_two_largest_of_four():
    model = build("residual")
    pruned = prune(model, EXAMPLE, PruneConfig(kind="2:4")).model
    before, after = model.layer1[0].conv1.weight, pruned.layer1[0].conv1.weight
    for place in range(9):
        run = before[5, 8:12, place // 3, place % 3]
        kept = after[5, 8:12, place // 3, place % 3]
        largest = run.abs().topk(2).indices
        assert sorted(largest.tolist()) == kept.nonzero().flatten().tolist()
        assert torch.equal(kept[largest], run[largest])


def test_excluded_layers_are_listed():
    excluded = prune(build("depthwise"), EXAMPLE, PruneConfig(kind="2:4", exclude=("expand",))).excluded
    assert excluded == {
        "stem.0": "it reads 3 channels, no multiple of 4",
        "expand.0": "named in prune.exclude",
        "depthwise.0": "a depthwise convolution",
        "classifier.2": "it writes the logits",
    }


def test_zeros_grow_in_steps_to_the_same_share():
    model = build("residual")
    config = PruneConfig(kind="weights", ratio=0.8, steps=2)
    first = prune(model, EXAMPLE, config, done=0.5)
    assert first.ratio == 0.4
    assert all(share == pytest.approx(0.4, abs=0.01) for share in zeros_of(first.model).values())
    second = prune(first.model, EXAMPLE, config, full=model, done=1.0).model
    assert all(share == pytest.approx(0.8, abs=0.01) for share in zeros_of(second).values())
    masks = masks_of(first.model)
    assert all(not (mask & ~masks[path]).any() for path, mask in masks_of(second).items())


def test_masks_keep_zeros_through_training():
    model = prune(build("residual"), EXAMPLE, PruneConfig(kind="weights")).model
    masks, optimizer = masks_of(model), sgd(model)
    for seed in range(2):
        step(model, optimizer, seed)
        apply_masks(model, masks)
    assert all(torch.equal(mask, masks[path]) for path, mask in masks_of(model).items())
    step(model, optimizer, seed=2)
    assert not masks_of(model)  # without masks, all of them learn


def test_layer_initialized_to_zero_has_no_mask():
    model = build("plain")
    nn.init.zeros_(model.stage1[0].weight)
    assert masks_of(model) == {}


def test_model_without_prunable_weights_is_an_error():
    with pytest.raises(ModelError, match=r"can lose weights \(1: it writes the logits\)"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.zeros(1, *IMAGE_SHAPE), PruneConfig(kind="weights"))


COMPUTED = {
    "old weight norm": nn.utils.weight_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("norm", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_stay(norm):
    model = build("plain")
    norm(model.stage2[0])
    model(EXAMPLE).sum().backward()  # an old norm keeps what it computed, which deepcopy refuses
    pruned = prune(model, EXAMPLE, PruneConfig(kind="weights", ratio=0.75))
    assert pruned.excluded["stage2.0"] == "its weight is computed (weight or spectral norm)"
    assert set(masks_of(pruned.model)) == {"stage1.0.weight", "hidden.0.weight"}
    with pytest.raises(ModelError, match="the weight of stage2.0 is computed .* prune.kind = 'weights'"):
        prune(model, EXAMPLE, PruneConfig(ratio=0.5))


def test_a_further_head_of_pruned_channels_is_refused():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool = nn.Conv2d(3, 8, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc, self.aux = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, images):
            x = self.pool(self.body(images))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    model = Aux()
    keep_main_logits("Aux", model, IMAGE_SHAPE, print)
    with pytest.raises(ModelError, match="does not run in training .*: leave out the further heads"):
        prune(model, EXAMPLE, PruneConfig(ratio=0.5, round_to=1))
