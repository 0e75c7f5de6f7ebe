"""Tests of the INT8 sensitivity of layers."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images, sgd, step
from torch import nn
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.compress.quantization.sensitivity import sensitivity
from kdpipe.stages.errors import ModelError


def batches(count: int = 2):
    return [images(30, seed)[0] for seed in range(count)]


@pytest.fixture(scope="module")
def trained():
    model = build("residual")
    optimizer = sgd(model)
    for seed in range(15):
        step(model, optimizer, seed)
    return model.eval()


def damaged(model: nn.Module) -> nn.Module:
    """Return `model` with a huge weight in every output of layer1.0.conv2, on an input channel that is always zero."""
    changed = build("residual")
    changed.load_state_dict(model.state_dict())
    block = changed.get_submodule("layer1.0")
    with torch.no_grad():
        block.bn1.weight[0], block.bn1.bias[0] = 0, 0
        block.conv2.weight[:, 0, 1, 1] = 100 * block.conv2.weight.abs().max()
    return changed.eval()


def divergence(model: nn.Module, exclude=()) -> float:
    """Return KL(float || INT8) over the batches, computed independently."""
    prepared = prepare_qat(model, EXAMPLE, exclude)
    calibrate(prepared, batches())
    everything = torch.cat(batches())
    with torch.no_grad():
        logits = [network.eval()(everything).double().log_softmax(dim=1) for network in (prepared, model)]
    return float(F.kl_div(*logits, log_target=True, reduction="batchmean"))


def test_damaged_layer_ranks_first(trained):
    model = damaged(trained)
    found = sensitivity(model, EXAMPLE, batches())
    assert found[0].path == "layer1.0.conv2"
    assert max(found, key=lambda layer: layer.kl_alone) == found[0]
    assert divergence(model, [found[0].path]) < 0.2 * divergence(model)


def test_kl_recovered_matches_excluding_the_layer(trained):
    found = sensitivity(trained, EXAMPLE, batches())
    full = divergence(trained)
    for layer in found:
        gain = full - divergence(trained, [layer.path])
        assert layer.kl_recovered == pytest.approx(gain, rel=0.02, abs=1e-3 * full), layer.path
    assert [layer.kl_recovered for layer in found] == sorted((layer.kl_recovered for layer in found), reverse=True)


def test_every_layer_is_listed_once_with_its_parameters(trained):
    found = {layer.path: layer for layer in sensitivity(trained, EXAMPLE, batches())}
    layers = {path: module for path, module in trained.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert found.keys() == layers.keys()
    assert found["fc"].num_parameters == 24 * 5 + 5
    assert found["layer1.0.conv1"].num_parameters == 16 * 16 * 9 + 16  # the bias that the batch norm leaves
    for layer in found.values():
        assert 0 < layer.kl_alone < 1


def test_model_stays_unchanged_and_result_is_repeatable(trained):
    model = trained.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    captured = []
    handle = model.fc.register_forward_hook(lambda *_: captured.append(1))
    first = sensitivity(model, EXAMPLE, batches())
    handle.remove()
    assert model.training and not captured
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sensitivity(model.eval(), EXAMPLE, batches()) == first


def test_excluded_layers_are_not_listed(trained):
    everything = sensitivity(trained, EXAMPLE, batches())
    rest = sensitivity(trained, EXAMPLE, batches(), exclude=[everything[0].path])
    assert {layer.path for layer in rest} == {layer.path for layer in everything[1:]}
    best = divergence(trained, [everything[0].path]) - divergence(trained, [everything[0].path, rest[0].path])
    assert rest[0].kl_recovered == pytest.approx(best, rel=0.02, abs=1e-6)


def test_progress_is_reported_and_can_stop_it(trained):
    calls = []
    found = sensitivity(trained, EXAMPLE, batches(), on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 2 * len(found)) for done in range(1, 2 * len(found) + 1)]

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(trained, EXAMPLE, batches(), on_progress=stop)


def test_no_batch_is_an_error(trained):
    with pytest.raises(ModelError, match="no batch"):
        sensitivity(trained, EXAMPLE, [])
