"""Tests of INT4 linear layers: rounding, file size, and agreement with onnxruntime."""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, NUM_CLASSES, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.quantization.int4 import Int4Linear, prepare_int4, quantize_int4
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.exportable import export_form
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts
from kdpipe.stages.export.torch_export import export_program
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors

NUM_PIXELS = math.prod(IMAGE_SHAPE)


def mlp(seed: int = 0, width: int = 64) -> nn.Module:
    """Build linear layers of 192, 100 (no multiple of the block size) and 64 inputs, and one too small to round."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(NUM_PIXELS, 100), nn.ReLU()),
        nn.Sequential(nn.Linear(100, width, bias=False), nn.ReLU()),
        nn.Linear(width, 24),
        nn.ReLU(),
        nn.Linear(24, NUM_CLASSES),
    )


class Tokens(nn.Module):
    """Linear layers over [B, T, F], as in an MLP mixer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(NUM_PIXELS // 4, 48)
        self.norm = nn.LayerNorm(48)
        self.hidden = nn.Linear(48, 48)
        self.head = nn.Linear(48, NUM_CLASSES)

    def forward(self, x):
        x = self.embed(x.reshape(x.size(0), 4, NUM_PIXELS // 4))
        return self.head((x + self.hidden(self.norm(x)).relu()).mean(dim=1))


def trained(model: nn.Module, num_steps: int = 15) -> nn.Module:
    optimizer = sgd(model)
    for seed in range(num_steps):
        step(model, optimizer, seed)
    return model.eval()


def int4_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Int4Linear)]


@pytest.fixture(scope="module", params=["mlp", "tokens"])
def net(request):
    torch.manual_seed(0)
    return trained(mlp() if request.param == "mlp" else Tokens())


def test_block_has_sixteen_values_and_exact_largest():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    weight[2], weight[3, 16:32] = 0, 0
    whole, scales = quantize_int4(weight, 16)
    assert whole.shape == (6, 4, 16) and scales.shape == (6, 4)
    assert set(whole.unique().tolist()) == set(range(-8, 8))
    assert scales.isfinite().all() and (scales != 0).all()
    read = (whole * scales.unsqueeze(2)).flatten(1)[:, :50]
    assert torch.equal(read[weight == 0], torch.zeros_like(read[weight == 0]))
    for start in range(0, 50, 16):
        block, found = weight[:, start : start + 16], read[:, start : start + 16]
        step = block.abs().amax(dim=1, keepdim=True) / 8
        at = block.abs().argmax(dim=1, keepdim=True)
        torch.testing.assert_close(found.gather(1, at), block.gather(1, at), rtol=1e-6, atol=0)
        assert ((found - block).abs() <= step + 1e-6).all()  # one step where the other end is clipped, else half a one


def test_grid_matches_onnxruntime_quantizer():
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=4)
    packed, scales, _ = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight.T.contiguous().numpy())
    portable = export_form(nn.Sequential(Int4Linear(_linear(weight), 32)))[0]
    np.testing.assert_allclose(portable.scales.numpy(), scales.reshape(5, 2), rtol=1e-6)
    assert (portable.packed.numpy() == packed).mean() > 0.99  # but for halves, which it rounds away from zero


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


def test_only_large_included_linears_are_rounded(net):
    prepared = prepare_int4(net, EXAMPLE)
    large = [path for path, module in net.named_modules() if isinstance(module, nn.Linear) and module.in_features >= 32]
    assert int4_layers(prepared) == large
    assert not int4_layers(net)
    assert int4_layers(prepare_int4(net, EXAMPLE, exclude=large[1:])) == large[:1]
    assert int4_layers(prepare_int4(mlp(), EXAMPLE, block_size=128)) == ["1.0"]
    assert int4_layers(prepare_int4(mlp(), EXAMPLE, exclude=["1"])) == ["2.0", "3"]
    batch, _ = images(50, seed=9)
    with torch.no_grad():
        expected, found = net(batch), prepared(batch)
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


def test_state_paths_hooks_and_modes_match_float_network(tmp_path):
    model = mlp().train()
    model[2].eval()
    captured = []
    model[3].register_forward_hook(lambda *_: captured.append("float"))
    prepared = prepare_int4(model, EXAMPLE)
    assert not captured
    assert [module.training for module in prepared.modules()] == [module.training for module in model.modules()]
    prepared[3].register_forward_hook(lambda module, inputs, output: captured.append(output.shape))
    prepared(images(4)[0])
    assert captured == [(4, 24)]
    save_tensors(tmp_path / "state", prepared.state_dict(), {})
    again = prepare_int4(mlp(seed=4), EXAMPLE)
    again.load_state_dict(load_tensors(tmp_path / "state")[0], strict=True)
    batch, _ = images(4)
    assert torch.equal(again.train()(batch), prepared.train()(batch))
    assert {path for path, _ in prepared.named_modules()} == {path for path, _ in model.named_modules()}


def test_fine_tuning_recovers_rounding_loss():
    model = trained(mlp())
    prepared = prepare_int4(model, EXAMPLE, block_size=128)
    batch, labels = images(200, seed=9)

    def loss(network):
        with torch.no_grad():
            return float(nn.functional.cross_entropy(network.eval()(batch), labels))

    before, weights = loss(prepared), copy.deepcopy(prepared.state_dict())
    optimizer = sgd(prepared, lr=0.01)
    for seed in range(10):
        step(prepared, optimizer, seed)
    assert loss(prepared) < before
    assert all(
        not torch.equal(weights[f"{path}.weight"], prepared.state_dict()[f"{path}.weight"]) for path in ("1.0", "3")
    )


def test_shared_layer_stays_shared_uncalled_stays_float():
    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(NUM_PIXELS, NUM_PIXELS), nn.Linear(NUM_PIXELS, NUM_CLASSES)
            self.second = self.first
            self.only_read = nn.Linear(NUM_PIXELS, NUM_PIXELS)

        def forward(self, x):
            x = self.second(self.first(x.flatten(1)).relu())
            return self.head(nn.functional.linear(x, self.only_read.weight))

    prepared = prepare_int4(Sharing(), EXAMPLE)
    assert prepared.first is prepared.second and isinstance(prepared.first, Int4Linear)
    assert type(prepared.only_read) is nn.Linear


def test_onnxruntime_runs_int4_and_agrees(net, tmp_path):
    prepared = prepare_int4(net, EXAMPLE)
    export_onnx(prepared, EXAMPLE, tmp_path / "int4.onnx", metadata={})
    counts = op_counts(tmp_path / "int4.onnx")
    num_linears = sum(isinstance(module, nn.Linear) for module in net.modules())
    assert counts["MatMulNBits"] == len(int4_layers(prepared)) > 0
    assert counts.get("Gemm", 0) + counts.get("MatMul", 0) == num_linears - len(int4_layers(prepared))
    agreement = check_onnx(tmp_path / "int4.onnx", prepared, [images(300, seed=50)])
    assert agreement.agreement >= 0.99
    assert agreement.max_logit_difference < 1e-3


def test_any_batch_size_runs(net, tmp_path):
    export_onnx(prepare_int4(net, EXAMPLE), EXAMPLE, tmp_path / "int4.onnx", metadata={})
    session = onnxruntime.InferenceSession(str(tmp_path / "int4.onnx"), providers=["CPUExecutionProvider"])
    batch, _ = images(5)
    together = session.run(["logits"], {"images": batch.numpy()})[0]
    alone = [session.run(["logits"], {"images": batch[i : i + 1].numpy()})[0] for i in range(5)]
    assert together.shape == (5, NUM_CLASSES)
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=1e-4, atol=1e-4)


def test_weights_take_half_a_byte_plus_block_scales(tmp_path):
    model = mlp(width=96)
    prepared = prepare_int4(model, EXAMPLE, block_size=64, exclude=["2", "3"])
    export_onnx(model, EXAMPLE, tmp_path / "float.onnx", metadata={})
    export_onnx(prepared, EXAMPLE, tmp_path / "int4.onnx", metadata={})
    rounded = model[1][0].weight.numel()
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "int4.onnx").graph.initializer}
    assert onnx.numpy_helper.to_array(stored["1.0.packed"]).nbytes == rounded // 2
    assert onnx.numpy_helper.to_array(stored["1.0.scales"]).nbytes == rounded // 64 * 4
    saved = (tmp_path / "float.onnx").stat().st_size - (tmp_path / "int4.onnx").stat().st_size
    assert saved > 0.8 * 4 * rounded


def test_export_form_runs_in_torch(net):
    prepared = prepare_int4(net, EXAMPLE)
    batch, _ = images(8)
    with torch.no_grad():
        torch.testing.assert_close(export_form(prepared)(batch), prepared(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(export_form(net.train())(batch), net.eval()(batch))
    assert int4_layers(prepared)


def test_torch_program_packs_two_weights_per_byte(net, tmp_path):
    prepared = prepare_int4(net, EXAMPLE)
    export_program(prepared, EXAMPLE, tmp_path / "int4.pt2")
    program = torch.export.load(tmp_path / "int4.pt2")
    for path in int4_layers(prepared):
        assert program.state_dict[f"{path}.packed"].dtype == torch.uint8
        assert f"{path}.weight" not in program.state_dict
    batch, _ = images(5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), prepared(batch), rtol=1e-5, atol=1e-5)
    assert int4_layers(prepared)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 20}, r"block_size = 20 .* one of \(16, 32, 64, 128, 256\)"),
        ({"block_size": 256}, "no linear layer of 256 inputs or more"),
        ({"exclude": ["1", "2", "3"]}, "no linear layer left"),
        ({"exclude": ["1.9"]}, r"no module '1\.9'; did you mean '1\.1' or '1\.0'"),
        ({"exclude": ["5"]}, "'5', which has no layer that INT4 would round"),
    ],
)
def test_invalid_int4_requests_are_errors(options, sentence):
    with pytest.raises(ModelError, match=sentence) as raised:
        prepare_int4(mlp(), EXAMPLE, **options)
    assert "\n" not in str(raised.value)


def test_wrong_input_shape_is_an_error():
    with pytest.raises(ModelError, match=r"does not run on an input of shape \[1, 3, 9, 9\]"):
        prepare_int4(mlp(), torch.zeros(1, 3, 9, 9))


def test_convolutions_stay_float_in_int4(tmp_path):
    prepared = prepare_int4(build("plain"), EXAMPLE)
    assert int4_layers(prepared) == ["hidden.0", "fc"]
    export_onnx(prepared, EXAMPLE, tmp_path / "int4.onnx", metadata={})
    counts = op_counts(tmp_path / "int4.onnx")
    assert counts["MatMulNBits"] == 2 and counts["Conv"] == 2
