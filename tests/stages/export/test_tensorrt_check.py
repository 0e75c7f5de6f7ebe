"""Tests of the rules of TensorRT's parser, on files with the grid for it and without."""

import onnx
import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.tensorrt_check import require_tensorrt, tensorrt_violations


def exported(folder, name, grid):
    """Return a calibrated network, and its INT8 file."""
    torch.manual_seed(0)
    prepared = prepare_qat(build(name).eval(), EXAMPLE, grid=grid)
    calibrate(prepared, [images(60, seed=seed)[0] for seed in range(3)])
    export_onnx(prepared, EXAMPLE, folder / "int8.onnx", metadata={})
    return prepared.eval(), folder / "int8.onnx"


@pytest.mark.parametrize("name", ["residual", "depthwise", "branching"])
def test_symmetric_file_keeps_the_rules_and_agrees(tmp_path, name):
    prepared, path = exported(tmp_path, name, "symmetric")
    require_tensorrt(path)
    found = check_onnx(path, prepared, [images(200, seed=50)])
    assert found.agreement >= 0.98
    assert {tensor.data_type for tensor in onnx.load(path).graph.initializer} & {
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT32,
    } == set()


def test_onnxruntimes_grid_is_refused_with_reasons(tmp_path):
    _, path = exported(tmp_path, "residual", "affine")
    found = " ".join(tensorrt_violations(onnx.load(path)))
    assert "its zero point has the type UINT8" in found and "its zero point has the type INT32" in found
    with pytest.raises(ModelError, match=r"TensorRT would not take .*int8.onnx: QuantizeLinear .* more\. Compress"):
        require_tensorrt(path)


def test_each_rule_is_checked(tmp_path):
    _, path = exported(tmp_path, "residual", "symmetric")

    def violations(change):
        proto = onnx.load(path)
        change(proto.graph)
        return " ".join(tensorrt_violations(proto))

    def constant(graph, name):
        return next(tensor for tensor in graph.initializer if tensor.name == name)

    def rounding(graph, *, of_weight):
        weights = {tensor.name for tensor in graph.initializer}
        found = (node for node in graph.node if node.op_type == "DequantizeLinear")
        return next(node for node in found if (node.input[0] in weights) == of_weight)

    def shift_zero(graph):
        constant(graph, rounding(graph, of_weight=False).input[2]).raw_data = b"\x01"

    def negate_scale(graph):
        scale = constant(graph, rounding(graph, of_weight=False).input[1])
        scale.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scale), scale.name))

    def scale_inputs(graph):
        rounding(graph, of_weight=True).attribute[0].i = 1

    def scale_an_activation(graph):
        weight = rounding(graph, of_weight=True)
        rounding(graph, of_weight=False).input[1] = weight.input[1]

    def add_in_float(graph):
        made = {node.output[0]: node for node in graph.node}
        add = next(node for node in graph.node if node.op_type == "Add")
        add.input[0] = made[made[add.input[0]].input[0]].input[0]  # before its rounding

    def own_operator(graph):
        graph.node[0].domain = "com.microsoft"

    assert "zero point other than 0" in violations(shift_zero)
    assert "scale that is no positive constant" in violations(negate_scale)
    assert "along axis 1 of a weight" in violations(scale_inputs)
    assert "scale per channel on an activation" in violations(scale_an_activation)
    assert "not on both sides of the sum" in violations(add_in_float)
    assert "an operator of com.microsoft" in violations(own_operator)
