"""Tests of excluded layers: exactly they are float, in the network and in the file."""

from __future__ import annotations

import pytest
import torch
from support.tiny_families import vit
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, NUM_CLASSES, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.quantization.fake_quant import (
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    round_weight,
    set_rounding,
    weight_scale,
)
from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts, optimized_graph

FLOAT_LAYERS = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedGemm"}


def batches(count: int = 3):
    return [images(20, seed)[0] for seed in range(count)]


def prepared_and_calibrated(model: nn.Module, exclude=()):
    prepared = prepare_qat(model, EXAMPLE, exclude)
    calibrate(prepared, batches())
    return prepared.eval()


def float_layers(prepared: nn.Module) -> set[str]:
    return {
        path
        for path, module in prepared.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, QuantConv2d | QuantLinear)
    }


def exported(prepared: nn.Module, path, *, top1: float = 0.99) -> dict[str, int]:
    """Export and check the network; return the file's operators."""
    export_onnx(prepared, EXAMPLE, path, metadata={})
    batch, labels = images(300, seed=50)
    with torch.no_grad():
        logits = prepared.eval()(batch)
    agreement = check_onnx(path, prepared, [(batch, labels)])
    assert agreement.agreement >= top1
    assert agreement.max_logit_difference < 0.1 * logits.std()
    return op_counts(path)


def num_float_layers(counts: dict[str, int]) -> int:
    return sum(counts.get(name, 0) for name in FLOAT_LAYERS)


EXCLUDED = {  # what is excluded: the layers that are float then, and how many additions still are integer ones
    ("residual", "layer1.0.conv2"): ({"layer1.0.conv2"}, 3),
    ("residual", "layer1.0"): ({"layer1.0.conv1", "layer1.0.conv2"}, 2),
    ("residual", "fc"): ({"fc"}, 3),
    ("depthwise", "depthwise"): ({"depthwise.0"}, 1),
    ("preactivation", "bn1"): ({"bn1"}, 1),
    ("branching", "left"): ({"left"}, 0),
    ("plain", "hidden"): ({"hidden.0"}, 0),
}


@pytest.mark.parametrize(("name", "path"), EXCLUDED)
def test_excluded_modules_are_float_in_network_and_file(name, path, tmp_path):
    layers, num_integer_sums = EXCLUDED[name, path]
    prepared = prepared_and_calibrated(build(name), [path])
    assert float_layers(prepared) == layers
    counts = exported(prepared, tmp_path / "model.onnx")
    assert num_float_layers(counts) == len(layers)
    num_rounding = sum(isinstance(module, QuantConv2d | QuantLinear) for module in prepared.modules())
    assert counts.get("QLinearConv", 0) + counts.get("QGemm", 0) == num_rounding
    assert counts.get("QLinearAdd", 0) == num_integer_sums
    assert not {"AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "MaxPool"} & counts.keys()


@pytest.mark.parametrize(
    ("name", "path", "pools"),
    [
        ("plain", "stage1.0", ["MaxPool", "NhwcMaxPool"]),
        ("plain", "stage2", ["NhwcMaxPool", "MaxPool"]),
        ("branching", "stem", ["MaxPool"]),
    ],
)
def test_max_pool_after_float_layer_is_float_then_rounded(name, path, pools, tmp_path):
    prepared = prepared_and_calibrated(build(name), [path])
    counts = exported(prepared, tmp_path / "model.onnx")
    assert num_float_layers(counts) == 1
    graph = optimized_graph(tmp_path / "model.onnx")
    producers = {value: node.op_type for node in graph.node for value in node.output}
    found = [(node.op_type, producers[node.input[0]]) for node in graph.node if "MaxPool" in node.op_type]
    assert [pool for pool, _ in found] == pools
    assert "QuantizeLinear" not in {before for _, before in found}


def test_quantizer_after_max_pool_keeps_its_state_name():
    state = prepare_qat(build("plain"), EXAMPLE).state_dict()
    assert list(prepare_qat(build("plain"), EXAMPLE, ["stage2"]).state_dict()) == list(state)
    assert "quantizers.stage2_1.high" in state  # of the ReLU


def test_value_also_read_by_integers_is_rounded_before_pool():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            x = self.stem(x)
            return (self.conv(x) + self.pool(x)).flatten(1)

    prepared = prepared_and_calibrated(Both(), ["stem"])
    read = []
    for path in ("conv", "pool"):
        prepared.get_submodule(path).register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    prepared(images(100)[0])
    assert torch.equal(*read) and len(read[0].unique()) <= 256


def test_float_output_is_rounded_only_for_integer_readers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 5))
    excluded = prepared_and_calibrated(model, ["1", "2"])
    assert {path.removeprefix("quantizers.") for path in quantizers_of(excluded)} == {"input_1", "_0", "_2"}


def test_excluded_weights_stay_float_with_folded_norms():
    model = build("residual").eval()
    prepared = prepared_and_calibrated(model, ["layer1.0.conv1"])
    layer = prepared.get_submodule("layer1.0.conv1")
    assert type(layer) is nn.Conv2d and layer.bias is not None
    assert isinstance(prepared.get_submodule("layer1.0.bn1"), nn.Identity)
    set_rounding(prepared, False)
    batch, _ = images(6)
    torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_excluded_layers_train_and_reload():
    prepared = prepared_and_calibrated(build("residual"), ["layer1.0", "fc"])
    step(prepared, sgd(prepared), seed=1)
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    again = prepare_qat(build("residual", seed=5), EXAMPLE, ["layer1.0", "fc"])
    again.load_state_dict(prepared.state_dict(), strict=True)
    batch, _ = images(4)
    assert torch.equal(again.eval()(batch), prepared.eval()(batch))
    assert {path for path, _ in build("residual").named_modules()} <= {path for path, _ in prepared.named_modules()}


def test_shared_module_is_excluded_under_either_path():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.alias = self.conv
            self.fc = nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            return self.fc(self.alias(self.conv(self.stem(x)).relu()).mean((2, 3)))

    for path in ("conv", "alias"):
        assert float_layers(prepare_qat(Shared(), EXAMPLE, [path])) == {"conv"}


@pytest.mark.parametrize(
    ("exclude", "sentence"),
    [
        (["layer1.0.conv3"], r"no module 'layer1\.0\.conv3'; did you mean 'layer1\.0\.conv"),
        (["fc", "stem.2"], r"'stem\.2', which has no operation that INT8 would compute"),
        (["stem", "layer1", "layer2", "fc"], "nothing left to quantize"),
    ],
)
def test_invalid_exclusions_are_errors(exclude, sentence):
    with pytest.raises(ModelError, match=sentence) as raised:
        prepare_qat(build("residual"), EXAMPLE, exclude)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = vit(NUM_CLASSES, *IMAGE_SHAPE[:1], IMAGE_SHAPE[1:])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for seed in range(30):
        step(model, optimizer, seed)
    return model.eval()


def test_vit_has_integer_mlps_and_float_attention(transformer, tmp_path):
    prepared = prepared_and_calibrated(transformer)
    rounding = {path for path, module in prepared.named_modules() if isinstance(module, QuantConv2d | QuantLinear)}
    mlps = {f"encoder.layers.encoder_layer_{block}.mlp.{layer}" for block in (0, 1) for layer in (0, 3)}
    assert rounding == {"conv_proj", "heads.head"} | mlps
    names = {path.removeprefix("quantizers.") for path in quantizers_of(prepared)}
    assert not [name for name in names if name.startswith(("add", "cat", "class_token"))]  # the residual stream
    counts = exported(prepared, tmp_path / "vit.onnx")
    assert (counts["QLinearConv"], counts["QGemm"], counts["MatMulIntegerToFloat"]) == (1, 1, 4)
    assert counts["LayerNormalization"] + counts.get("SkipLayerNormalization", 0) == 5
    assert counts["Softmax"] == 2 and "QLinearAdd" not in counts
    assert counts["MatMul"] + counts["FusedMatMul"] + counts["Gemm"] == 2 * 4  # in and out projection, two products


def test_vit_block_can_be_excluded(transformer):
    block = "encoder.layers.encoder_layer_1"
    prepared = prepare_qat(transformer, EXAMPLE, [block])
    assert {path for path in float_layers(prepared) if "mlp" in path} == {f"{block}.mlp.0", f"{block}.mlp.3"}
    with pytest.raises(ModelError, match="has no operation that INT8 would compute"):
        prepare_qat(transformer, EXAMPLE, ["encoder.layers.encoder_layer_1.self_attention"])


def test_zero_weights_survive_folding_and_rounding():
    model, masks = build("residual"), {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            masks[path] = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(len(path))) < 0.5
            layer.weight.data[masks[path]] = 0
    prepared = prepared_and_calibrated(model)
    for path, mask in masks.items():
        layer = prepared.get_submodule(path)
        assert isinstance(layer, QuantConv2d | QuantLinear)
        multiplied = round_weight(layer.weight, weight_scale(layer.weight))
        for weight in (layer.weight, multiplied):
            assert not weight[mask].any() and weight[~mask].any()
