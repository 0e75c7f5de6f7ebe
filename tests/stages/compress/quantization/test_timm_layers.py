"""INT8 of timm's layers: batch norms with an activation inside, and "same" padding."""

import pytest
import torch
from torch import fx, nn

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat, trace_folded
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import float_nodes, op_counts, open_session
from kdpipe.stages.models.hooks import extract_features

timm_layers = pytest.importorskip("timm.layers")


def network() -> nn.Module:
    """Build blocks of EfficientNet (convolution, then norm) and ResNetV2 (norm, then convolution)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        timm_layers.Conv2dSame(3, 8, 3, stride=2, bias=False),
        timm_layers.BatchNormAct2d(8, act_layer=nn.ReLU6),
        nn.MaxPool2d(2),
        timm_layers.BatchNormAct2d(8),
        timm_layers.Conv2dSame(8, 8, 5, stride=2, groups=8),
        timm_layers.BatchNormAct2d(8, apply_act=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for norm in (module for module in model if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("size", [16, 21])
def test_the_folded_network_equals_the_original(size):
    model, images = network(), torch.rand(3, 3, size, size)
    folded = trace_folded(model, images[:2], fx.GraphModule)
    torch.testing.assert_close(folded(images), model(images))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    layers = ["1", "3", "1.act"]
    with extract_features(model, layers) as wanted, extract_features(folded, layers) as found:
        torch.testing.assert_close(found(images).features, wanted(images).features)


def test_the_int8_file_computes_nothing_in_float(tmp_path):
    model, images = network(), torch.rand(8, 3, 16, 16)
    calibrate(prepared := prepare_qat(model, images[:2]), [images])
    export_onnx(prepared.eval(), images, tmp_path / "int8.onnx", metadata={})
    assert float_nodes(tmp_path / "int8.onnx") == []
    assert "Pad" not in op_counts(tmp_path / "int8.onnx")
    [found] = open_session(tmp_path / "int8.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), prepared(images), atol=0.02, rtol=0)


def test_a_norm_alone_may_stay_float():
    model, images = network(), torch.rand(8, 3, 16, 16)
    prepared = prepare_qat(model, images[:2], exclude=["3"])
    assert type(prepared.get_submodule("3.norm")) is nn.Conv2d
    calibrate(prepared, [images])
    assert (prepared(images) - model(images)).abs().max() < 0.05 * model(images).abs().max()
