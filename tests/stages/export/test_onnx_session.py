"""Tests of listing what onnxruntime does not run on integers."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, NUM_CLASSES, build, images
from torch import Tensor, nn

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import float_nodes, op_counts


class Normalizing(nn.Module):
    """A convolution, and operations without an integer kernel in onnxruntime; hard swish has no kernel at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU())
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardswish())
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sqrt(self.gate(self.stem(x)).abs() + 1)
        return self.fc(self.norm(x.mean(dim=(2, 3))))


def int8_file(model, folder):
    prepared = prepare_qat(model.eval(), EXAMPLE)
    calibrate(prepared, [images(20)[0]])
    export_onnx(prepared, EXAMPLE, folder / "int8.onnx", metadata={})
    return folder / "int8.onnx"


def test_fused_file_has_no_float_nodes(tmp_path):
    path = int8_file(build("branching"), tmp_path)
    assert float_nodes(path) == []
    assert {"QLinearConv", "QGemm"} <= op_counts(path).keys()


def test_float_nodes_are_listed_with_their_module(tmp_path):
    torch.manual_seed(0)
    found = {node.op_type: node for node in float_nodes(int8_file(Normalizing(), tmp_path))}
    assert found["Gelu"].module == "stem.1"
    assert str(found["Gelu"]) == "Gelu in stem.1"
    assert found["LayerNormalization"].module == "norm"
    assert str(found["Sqrt"]) == "Sqrt"  # in the network's own forward
    assert str(found["HardSigmoid"]) == "HardSigmoid"  # onnxruntime's own part of the hard swish
    assert not {"QLinearConv", "QGemm", "Reshape", "QuantizeLinear", "DequantizeLinear"} & found.keys()


def test_all_layers_of_a_float_file_are_float(tmp_path):
    export_onnx(build("plain").eval(), EXAMPLE, tmp_path / "model.onnx", metadata={})
    found = float_nodes(tmp_path / "model.onnx")
    layers = [node for node in found if node.op_type in {"Conv", "FusedConv", "Gemm", "FusedGemm"}]
    assert [node.module.partition(".")[0] for node in layers] == ["stage1", "stage2", "hidden", "fc"]


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no ONNX file at"):
        float_nodes(tmp_path / "absent.onnx")
