"""Single weights go by magnitude, the network keeps its shape, and what is zero stays zero while it trains."""

from __future__ import annotations

import pytest
import torch
from tiny_nets import EXAMPLE, IMAGE_SHAPE, NETS, UNPRUNABLE, build, sgd, step
from torch import nn

from stages.compression.prune import PruneConfig, prune
from stages.compression.sparsity import apply_masks, masks_of
from stages.compression.widths import record_widths
from stages.errors import ModelError


def zeros_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros by layer, of those that have some."""
    return {path: 1 - float(mask.float().mean()) for path, mask in masks_of(model).items()}


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
@pytest.mark.parametrize("config", [PruneConfig(kind="weights", ratio=0.75), PruneConfig(kind="2:4")])
def test_the_share_of_zeros_is_what_was_asked_and_nothing_else_changes(name, config):
    model = build(name)
    pruned = prune(model, EXAMPLE, config)
    shares = zeros_of(pruned.model)
    assert shares and all(share == pytest.approx(config.ratio, abs=0.01) for share in shares.values())
    assert record_widths(pruned.model) == record_widths(model)
    masks = masks_of(pruned.model)
    for path, before in model.state_dict().items():
        wanted = before * masks[path] if path in masks else before
        assert torch.equal(pruned.model.state_dict()[path], wanted)


def test_the_smallest_weights_of_a_layer_go():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.randperm(768).view(4, 192) - 300.5)
    weight = prune(model, EXAMPLE, PruneConfig(kind="weights", ratio=0.25)).model[1].weight
    assert torch.equal(weight != 0, model[1].weight.abs() > 96)


def test_global_takes_the_smallest_anywhere_but_no_more_of_a_layer_than_max_ratio():
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


def test_a_global_share_beyond_max_ratio_is_refused():
    with pytest.raises(ModelError, match=r"zeroing 95% .* prune\.max_ratio"):
        prune(build("plain"), EXAMPLE, PruneConfig(kind="weights", ratio=0.95, scope="global"))


def test_two_of_each_four_input_channels_are_kept_at_every_place_of_the_kernel():
    model = build("residual")
    pruned = prune(model, EXAMPLE, PruneConfig(kind="2:4")).model
    before, after = model.layer1[0].conv1.weight, pruned.layer1[0].conv1.weight
    for place in range(9):
        run = before[5, 8:12, place // 3, place % 3]
        kept = after[5, 8:12, place // 3, place % 3]
        largest = run.abs().topk(2).indices
        assert sorted(largest.tolist()) == kept.nonzero().flatten().tolist()
        assert torch.equal(kept[largest], run[largest])


def test_layers_that_stay_whole_are_named():
    spared = prune(build("depthwise"), EXAMPLE, PruneConfig(kind="2:4", keep=("expand",))).spared
    assert spared == {
        "stem.0": "it reads 3 channels, no multiple of 4",
        "expand.0": "named in prune.keep",
        "depthwise.0": "a depthwise convolution",
        "classifier.2": "it writes the logits",
    }


def test_in_steps_the_zeros_grow_to_the_same_share():
    model = build("residual")
    config = PruneConfig(kind="weights", ratio=0.8, steps=2)
    first = prune(model, EXAMPLE, config, done=0.5)
    assert first.ratio == 0.4
    assert all(share == pytest.approx(0.4, abs=0.01) for share in zeros_of(first.model).values())
    second = prune(first.model, EXAMPLE, config, full=model, done=1.0).model
    assert all(share == pytest.approx(0.8, abs=0.01) for share in zeros_of(second).values())
    masks = masks_of(first.model)
    assert all(not (mask & ~masks[path]).any() for path, mask in masks_of(second).items())


def test_masks_keep_the_zeros_through_training():
    model = prune(build("residual"), EXAMPLE, PruneConfig(kind="weights")).model
    masks, optimizer = masks_of(model), sgd(model)
    for seed in range(2):
        step(model, optimizer, seed)
        apply_masks(model, masks)
    assert all(torch.equal(mask, masks[path]) for path, mask in masks_of(model).items())
    step(model, optimizer, seed=2)
    assert not masks_of(model)  # without masks, all of them learn


def test_a_layer_that_starts_at_zero_is_free_to_learn():
    model = build("plain")
    nn.init.zeros_(model.stage1[0].weight)
    assert masks_of(model) == {}


def test_a_mask_of_another_model_is_told():
    with pytest.raises(ModelError, match=r"mask for 'hidden\.0\.weight'"):
        apply_masks(build("residual"), {"hidden.0.weight": torch.ones(32, 96, dtype=torch.bool)})


def test_a_model_without_such_layers_is_told():
    with pytest.raises(ModelError, match=r"can lose weights \(1: it writes the logits\)"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.zeros(1, *IMAGE_SHAPE), PruneConfig(kind="weights"))
