"""Settings of how a network is computed leave its weights, names and hooks as they are."""

import pytest
import torch
from torch import nn

from kdpipe.stages.compute.settings import EXACT, ComputeSettings, fast_precisions
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.runtime.cpu import has_bfloat16

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def test_channels_last_keeps_weights_and_hooks():
    model, images, calls = network(), torch.rand(2, 3, 8, 8), []
    before, exact = weights_sha256(model), model(images)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    settings = ComputeSettings(memory_format="channels_last")
    settings.place(model)
    placed = settings.place_images(images)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert placed.is_contiguous(memory_format=torch.channels_last) and torch.equal(placed, images)
    assert torch.allclose(model(placed), exact, atol=1e-5)
    assert weights_sha256(model) == before and calls


def test_placed_restores_the_weights():
    model = network()
    model.bias = nn.Parameter(torch.zeros(1, 2, 3, 4, 5))  # channels_last is for four dimensions
    strides = [parameter.stride() for parameter in model.parameters()]
    with ComputeSettings(memory_format="channels_last").placed(model):
        assert model[0].weight.stride() == (27, 1, 9, 3)
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_an_unknown_record_is_refused():
    with pytest.raises(ValueError, match="unknown settings"):
        ComputeSettings.from_json({"precision": "float8", "memory_format": "contiguous", "compile": False})


def test_precision_within_the_block():
    model, images = network(), torch.rand(2, 3, 8, 8)
    with ComputeSettings("bfloat16").active(CPU):
        assert model(images).dtype is torch.bfloat16
    with EXACT.active(CPU):
        assert model(images).dtype is torch.float32


def test_exact_changes_nothing():
    model, images = network(), torch.rand(2, 3, 8, 8)
    pointer = model[0].weight.data_ptr()
    EXACT.place(model)
    assert model[0].weight.data_ptr() == pointer and EXACT.place_images(images) is images


def test_record_round_trip():
    settings = ComputeSettings("tf32", "channels_last", compile=True)
    assert ComputeSettings.from_json(settings.to_json()) == settings


def test_precisions_of_a_cpu(tmp_path):
    assert set(fast_precisions(CPU)) <= {"bfloat16"}
    for flags, expected in (("avx2 avx512_bf16", True), ("avx2 avx512f", False)):
        cpuinfo = tmp_path / flags.split()[1]
        cpuinfo.write_text(f"processor : 0\nflags : {flags}\n")
        assert has_bfloat16(cpuinfo) is expected


def test_changed_weights_are_used_in_a_callers_autocast():
    model, images = nn.Linear(4, 2), torch.ones(3, 4)

    def logits():
        with ComputeSettings("bfloat16").active(CPU):
            return model(images)

    with torch.autocast("cpu", enabled=False):
        before = logits()
        with torch.no_grad():
            model.weight += 1
        assert torch.allclose(logits() - before, torch.full((3, 2), 4.0, dtype=torch.bfloat16), atol=0.1)
