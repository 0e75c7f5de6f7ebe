"""Tests of INT8 by onnxruntime's quantizer, for networks that torch.fx cannot trace."""

import copy

import numpy as np
import onnx
import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, build, images
from torch import nn

from kdpipe.stages.compress.quantization.fx_trace import UntraceableError
from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized, calibrate_onnx
from kdpipe.stages.compress.quantize_student import QuantizeConfig, config_of, prepare, quantized_record
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts
from kdpipe.stages.export.tensorrt_check import require_tensorrt


class Untraceable(nn.Module):
    """The residual network behind a check that torch.export sees through, and torch.fx does not."""

    def __init__(self):
        super().__init__()
        self.body = build("residual")

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("images must be a tensor")
        return self.body(x)


BATCHES = [images(30, seed=seed)[0] for seed in range(2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Untraceable().train()
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    return model.eval()


def calibrated(model, **options):
    quantized = OnnxQuantized()
    calibrate_onnx(quantized, model, BATCHES, image_shape=IMAGE_SHAPE, **options)
    return quantized


def test_only_networks_that_cannot_be_traced_go_to_onnxruntime(model):
    prepared = prepare(model, IMAGE_SHAPE, QuantizeConfig())
    assert isinstance(prepared, OnnxQuantized)
    assert "its forward (Untraceable): TypeError: images must be a tensor" in prepared.reason
    assert not isinstance(prepare(model.body, IMAGE_SHAPE, QuantizeConfig()), OnnxQuantized)
    assert isinstance(prepare(model.body, IMAGE_SHAPE, QuantizeConfig(quantizer="onnxruntime")), OnnxQuantized)
    with pytest.raises(UntraceableError, match="torch.fx cannot trace its forward"):
        prepare(model, IMAGE_SHAPE, QuantizeConfig(quantizer="torch"))
    with pytest.raises(RecipeError, match="only calibrates, in scheme = 'int8'"):
        QuantizeConfig(scheme="int4", quantizer="onnxruntime")
    record = quantized_record(QuantizeConfig(), prepared)
    assert record == {"quantized": "int8", "quantizer": "onnxruntime"}
    assert config_of(record).quantizer == "onnxruntime"


def test_file_is_integer_agrees_and_is_the_same_each_time(model, tmp_path):
    quantized = calibrated(model)
    assert calibrated(model).onnx_file() == quantized.onnx_file()
    path = tmp_path / "int8.onnx"
    export_onnx(quantized, EXAMPLE, path, metadata={"classes": "[]"})
    counts = op_counts(path)
    assert counts["QLinearConv"] == 8 and counts["QLinearAdd"] == 3 and counts["QGemm"] == 1
    assert check_onnx(path, model, [images(100, seed=5), images(1, seed=6)]).agreement >= 0.95
    own = check_onnx(path, quantized, [images(50, seed=5)])
    assert own.agreement == 1 and own.max_logit_difference == 0
    proto = onnx.load(path)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"classes": "[]"}
    assert {entry.domain for entry in proto.opset_import} == {""}


def test_copies_and_saved_weights_compute_the_same(model):
    quantized = calibrated(model)
    batch = images(3)[0]
    expected = quantized(batch)
    assert torch.equal(copy.deepcopy(quantized)(batch), expected)
    loaded = OnnxQuantized()
    with pytest.raises(ModelError, match="not calibrated"):
        loaded(batch)
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded(batch), expected)
    loaded.file = torch.ones(9, dtype=torch.uint8)
    with pytest.raises(ModelError, match="cannot load the INT8 network"):
        copy.deepcopy(loaded)(batch)


def test_excluded_modules_stay_float(model, tmp_path):
    path = tmp_path / "int8.onnx"
    export_onnx(calibrated(model, exclude=("body.layer1.0", "body.fc")), EXAMPLE, path, metadata={})
    counts = op_counts(path)
    assert counts["QLinearConv"] == 6 and "QGemm" not in counts
    with pytest.raises(ModelError, match="no module 'nosuch'"):
        calibrated(model, exclude=("nosuch",))
    with pytest.raises(ModelError, match=r"every layer is in quantize\.exclude"):
        calibrated(model, exclude=("body",))


def test_symmetric_grid_keeps_tensorrts_rules_and_zeros_stay_zero(model, tmp_path):
    network = copy.deepcopy(model)
    with torch.no_grad():
        network.body.layer1[0].conv1.weight[:, ::2] = 0
    path = tmp_path / "int8.onnx"
    export_onnx(calibrated(network, grid="symmetric"), EXAMPLE, path, metadata={})
    require_tensorrt(path)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    halves = [weight for weight in weights if weight.ndim == 4 and weight.shape[1] == 16 and not np.any(weight[:, ::2])]
    assert len(halves) == 1 and halves[0].dtype == np.int8
