"""Tests of FP16 files: types, agreement with torch, kept zeros, and values that float16 does not hold."""

import onnx
import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images

from kdpipe.stages.compress.pruning.sparsity import prune_2_4
from kdpipe.stages.evaluation.latency import measure_latency
from kdpipe.stages.export.float16 import export_float16, largest_value
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.tensorrt_check import num_2_4_weights


def float_file(folder, model):
    export_onnx(model, EXAMPLE, folder / "model.onnx", metadata={"classes": "[]"})
    return folder / "model.onnx"


@pytest.mark.parametrize("name", ["residual", "depthwise", "branching"])
def test_weights_are_float16_and_logits_agree_for_any_batch(tmp_path, name):
    torch.manual_seed(0)
    model = build(name).eval()
    source, path = float_file(tmp_path, model), tmp_path / "half.onnx"
    export_float16(source, path)
    found = check_onnx(path, model, [images(100, seed=1), images(1, seed=2)])
    assert found.agreement >= 0.98 and 0 < found.max_logit_difference < 0.05
    proto = onnx.load(path)
    weights = [tensor for tensor in proto.graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in weights if tensor.data_type != onnx.TensorProto.INT64} == {
        onnx.TensorProto.FLOAT16
    }
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"classes": "[]"}
    assert path.stat().st_size < source.stat().st_size
    assert measure_latency({"half": path}, None, [2], num_rounds=1, num_threads=1)["half"][2].p50_ms > 0
    again = tmp_path / "again.onnx"
    export_float16(source, again)
    assert again.read_bytes() == path.read_bytes()


def test_zeros_of_2_4_sparsity_stay(tmp_path):
    model = build("residual").eval()
    layers = {path: layer for path, layer in model.named_modules() if path.startswith("layer1") and "conv" in path}
    prune_2_4(layers)
    export_float16(float_file(tmp_path, model), tmp_path / "half.onnx")
    assert num_2_4_weights(tmp_path / "half.onnx") == len(layers)


def test_first_value_that_overflows_is_named(tmp_path):
    torch.manual_seed(0)
    model = build("residual").eval()
    path = float_file(tmp_path, model)
    fine = largest_value(path, [images(20)])
    with torch.no_grad():
        features = model.layer1(model.stem(images(20)[0]))
    assert fine.fits and fine.value >= float(features.abs().max()) * 0.999
    with torch.no_grad():
        model.layer1[1].bn2.weight.fill_(1e6)
    found = largest_value(float_file(tmp_path, model), [images(20)])
    assert not found.fits and ("layer1.1" in found.where or "bn2" in found.where)
