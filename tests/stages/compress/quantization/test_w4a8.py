"""Tests of weights of 4 bits beside activations of 8: grid, file, and agreement with onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from support.tiny_nets import EXAMPLE, NETS, build, images, sgd, step

from kdpipe.stages.compress.quantization.fake_quant import round_weight, weight_scale
from kdpipe.stages.compress.quantization.qat import calibrate, int4_candidates, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.int4_weights import PackedInt4
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts
from kdpipe.stages.export.torch_export import export_program


def w4a8(name: str, grid="affine", **kwargs):
    """Return a tiny network with weights of 4 bits, fine-tuned for some steps."""
    model = build(name).eval()
    prepared = prepare_qat(model, EXAMPLE, grid=grid, int4=int4_candidates(model, EXAMPLE), **kwargs)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    optimizer = sgd(prepared.train(), lr=0.01)
    for seed in range(5):
        step(prepared, optimizer, seed)
    return prepared.eval()


def stored_int4(path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == TensorProto.INT4}


def test_weights_have_at_most_sixteen_values():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    scale = weight_scale(weight, 4)
    whole = round_weight(weight, scale, 4) / scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    assert whole.min() >= -8.001 and whole.max() <= 7.001
    largest = whole.flatten(1).abs().amax(dim=1)
    torch.testing.assert_close(largest, torch.tensor([7.0, 7, 0, 7, 7, 7]))


def test_first_and_last_layer_keep_eight_bits():
    model = build("residual").eval()
    layers = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    found = int4_candidates(model, EXAMPLE)
    assert set(layers) - set(found) == {"stem.0", "fc"}
    rest = int4_candidates(model, EXAMPLE, exclude=["layer1"])
    assert rest == [path for path in found if not path.startswith("layer1")]
    with pytest.raises(ModelError, match="no layer whose weights could have 4 bits"):
        int4_candidates(model, EXAMPLE, exclude=["layer1", "layer2"])


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (1,), (4, 6)])
def test_packing_is_exact(shape):
    integers = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = PackedInt4(integers)
    assert torch.equal(packed(), integers) and packed().dtype == torch.int8
    assert packed.packed.numel() == -(-integers.numel() // 2)


@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_agrees_and_computes_in_integers(name, tmp_path):
    prepared, plain = w4a8(name), prepare_qat(build(name).eval(), EXAMPLE)
    calibrate(plain, [images(20)[0]])
    export_onnx(prepared, EXAMPLE, tmp_path / "w4a8.onnx", metadata={})
    export_onnx(plain, EXAMPLE, tmp_path / "int8.onnx", metadata={})
    onnx.checker.check_model(onnx.load(tmp_path / "w4a8.onnx"), full_check=True)
    assert op_counts(tmp_path / "w4a8.onnx") == op_counts(tmp_path / "int8.onnx")
    assert check_onnx(tmp_path / "w4a8.onnx", prepared, [images(300, seed=50)]).agreement >= 0.99


def test_file_has_half_a_byte_a_weight(tmp_path):
    prepared = w4a8("residual")
    export_onnx(prepared, EXAMPLE, tmp_path / "w4a8.onnx", metadata={})
    export_onnx(prepared, EXAMPLE, tmp_path / "again.onnx", metadata={})
    assert (tmp_path / "w4a8.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    stored = stored_int4(tmp_path / "w4a8.onnx")
    layers = {path: prepared.get_submodule(path) for path in int4_candidates(build("residual"), EXAMPLE)}
    assert len(stored) == len(layers)
    for path, layer in layers.items():
        tensor = stored[f"{path}.weights.weight.packed"]
        assert len(tensor.raw_data) == -(-layer.weight.numel() // 2)
        scale = weight_scale(layer.weight, 4)
        expected = round_weight(layer.weight, scale, 4) / scale.view(-1, *[1] * (layer.weight.dim() - 1))
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), expected.detach().round().numpy())


def test_torch_program_packs_two_weights_per_byte(tmp_path):
    prepared = w4a8("residual")
    export_program(prepared, EXAMPLE, tmp_path / "w4a8.pt2")
    program = torch.export.load(tmp_path / "w4a8.pt2")
    assert program.state_dict["layer1.0.conv1.weights.weight.packed"].dtype == torch.uint8
    batch, _ = images(5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), prepared(batch), rtol=1e-4, atol=1e-4)


def test_older_opset_is_refused(tmp_path):
    with pytest.raises(ModelError, match="opset 20 .* has no weights of 4 bits: choose 21"):
        export_onnx(w4a8("residual"), EXAMPLE, tmp_path / "w4a8.onnx", metadata={}, opset=20)
    export_onnx(w4a8("residual"), EXAMPLE, tmp_path / "w4a8.onnx", metadata={}, opset=21)
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "w4a8.onnx").opset_import} == {"": 21}


def test_layers_in_float_cannot_have_weights_of_4_bits():
    with pytest.raises(ModelError, match="'layer1' cannot have weights of 4 bits"):
        prepare_qat(build("residual"), EXAMPLE, int4=["layer1"])
    with pytest.raises(ModelError, match="'fc' cannot have weights of 4 bits"):
        prepare_qat(build("residual"), EXAMPLE, exclude=["fc"], int4=["fc"])
