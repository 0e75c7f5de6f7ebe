"""Tests of learned step sizes: gradients, the exported file, resume, and that they help."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tiny_nets import EXAMPLE, NETS, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    rounded_parameters,
)
from kdpipe.stages.compress.quantization.qat import calibrate, freeze_observers, int4_candidates, prepare_qat
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors


def learned(name: str, *, bits: int = 8, grid="affine", seed: int = 0):
    model = build(name, seed).eval()
    int4 = int4_candidates(model, EXAMPLE) if bits == 4 else ()
    prepared = prepare_qat(model, EXAMPLE, grid=grid, int4=int4, learns_steps=True)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    return prepared.train()


def fine_tuned(prepared: nn.Module, num_steps: int = 5) -> nn.Module:
    optimizer = sgd(prepared, lr=0.01)
    for seed in range(num_steps):
        step(prepared, optimizer, seed)
    return prepared.eval()


def lsq(value: torch.Tensor, step_size: torch.Tensor, lowest: int, highest: int, num_values: int) -> torch.Tensor:
    """Quantize as the pseudocode in the paper's appendix does, gradients by autograd."""

    def scale_gradient(x, factor):
        return (x - x * factor).detach() + x * factor

    def round_pass(x):
        return (x.round() - x).detach() + x

    s = scale_gradient(step_size, 1 / math.sqrt(num_values * highest))
    return round_pass(torch.clamp(value / s, lowest, highest)) * s


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_of_weights_are_those_of_the_paper(bits):
    layer = learned("residual", bits=bits).get_submodule("layer1.0.conv1")
    assert layer.bits == bits
    layer.step_size.data *= 0.5  # clips some weights
    factor = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    (rounded_parameters(layer)[0] * factor).sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    step_size = layer.step_size.detach().clone().requires_grad_()
    lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
    expected = lsq(weight, step_size.view(-1, 1, 1, 1), lowest, highest, weight[0].numel())
    (expected * factor).sum().backward()
    torch.testing.assert_close(rounded_parameters(layer)[0], expected)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.step_size.grad, step_size.grad, rtol=1e-4, atol=1e-5)
    assert (weight.grad == 0).any()


@pytest.mark.parametrize(("grid", "low", "bounds"), [("affine", 0.0, (0, 255)), ("symmetric", -2.0, (-128, 127))])
def test_gradients_of_activations_are_those_of_the_paper(grid, low, bounds):
    quantizer = ActivationQuantizer(grid)
    quantizer.step_size = nn.Parameter(torch.tensor(torch.nan))
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    calibrate(nn.Sequential(quantizer), [x.clamp(min=low)])
    quantizer.step_size.data *= 0.4
    mine = x.clone().requires_grad_()
    quantizer.train()(mine).square().sum().backward()
    other, step_size = x.clone().requires_grad_(), quantizer.step_size.detach().clone().requires_grad_()
    lsq(other, step_size, *bounds, num_values=48).square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(quantizer.step_size.grad, step_size.grad, rtol=1e-4, atol=1e-4)


def test_steps_start_as_the_observed_ones():
    observed = prepare_qat(build("residual").eval(), EXAMPLE)
    calibrate(observed, [images(20, seed)[0] for seed in range(3)])
    batch, _ = images(30, seed=9)
    with torch.no_grad():
        assert torch.equal(learned("residual").eval()(batch), observed.eval()(batch))


def test_training_moves_all_steps_and_no_range():
    prepared = learned("residual")
    before = copy.deepcopy(prepared.state_dict())
    fine_tuned(prepared)
    after = prepared.state_dict()
    steps = [name for name in after if name.endswith("step_size")]
    layers = [module for module in prepared.modules() if isinstance(module, QuantConv2d | QuantLinear)]
    assert len(steps) == len(layers) + len(quantizers_of(prepared))
    assert all(not torch.equal(before[name], after[name]) for name in steps)
    assert all(torch.equal(before[name], after[name]) for name in after if name.endswith((".low", ".high")))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_onnxruntime_agrees(name, bits, tmp_path):
    prepared = fine_tuned(learned(name, bits=bits))
    export_onnx(prepared, EXAMPLE, tmp_path / "learned.onnx", metadata={})
    assert check_onnx(tmp_path / "learned.onnx", prepared, [images(300, seed=50)]).agreement >= 0.99
    observed = prepare_qat(build(name).eval(), EXAMPLE)
    calibrate(observed, [images(20)[0]])
    export_onnx(observed, EXAMPLE, tmp_path / "observed.onnx", metadata={})
    assert op_counts(tmp_path / "learned.onnx") == op_counts(tmp_path / "observed.onnx")


def test_symmetric_file_agrees(tmp_path):
    prepared = fine_tuned(learned("residual", grid="symmetric"))
    export_onnx(prepared, EXAMPLE, tmp_path / "learned.onnx", metadata={})
    assert check_onnx(tmp_path / "learned.onnx", prepared, [images(300, seed=50)]).agreement >= 0.99
    for quantizer in quantizers_of(prepared).values():
        assert int(quantizer.scale_and_zero_point()[1]) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_step_of_zero_or_less_stays_usable(sign):
    layer = learned("residual").get_submodule("fc")
    expected = rounded_parameters(layer)[0].detach()
    layer.step_size.data *= sign
    assert torch.equal(rounded_parameters(layer)[0], expected)
    layer.step_size.data.zero_()
    rounded_parameters(layer)[0].sum().backward()
    assert rounded_parameters(layer)[0].isfinite().all() and layer.step_size.grad.isfinite().all()


def test_training_resumes_bit_for_bit_from_state(tmp_path):
    first = learned("residual", bits=4)
    optimizer = sgd(first)
    for seed in range(2):
        step(first, optimizer, seed)
    save_tensors(tmp_path / "state", first.state_dict(), {})
    state = copy.deepcopy(optimizer.state_dict())
    freeze_observers(first)
    step(first, optimizer, seed=2)

    model = build("residual", seed=5)
    second = prepare_qat(model, EXAMPLE, int4=int4_candidates(model, EXAMPLE), learns_steps=True)
    second.load_state_dict(load_tensors(tmp_path / "state")[0], strict=True)
    optimizer = sgd(second)
    optimizer.load_state_dict(state)
    freeze_observers(second)
    step(second, optimizer, seed=2)
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_block_scales_of_int4_are_not_learned():
    with pytest.raises(RecipeError, match="'learned' is not for scheme = 'int4'"):
        QuantizeConfig(scheme="int4", step_size="learned")
