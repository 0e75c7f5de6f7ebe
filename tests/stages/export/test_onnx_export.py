"""Tests of the ONNX export: agreement, integers, determinism, no local paths."""

from __future__ import annotations

import errno
import logging
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.tiny_nets import EXAMPLE, NUM_CLASSES, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.quantization.qat import calibrate, freeze_observers, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export import onnx_export as onnx_file
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_debug import first_divergence
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import op_counts

METADATA = {"mean": "[0.5]", "classes": '["cat"]'}
FLOAT_WORK = {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "ReduceMean", "AveragePool"}


@pytest.fixture(scope="module")
def trained():
    """Return a trained float network, pruned to odd widths, and the same prepared for INT8 and fine-tuned."""
    model = prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.3, round_to=1)).model
    optimizer = sgd(model)
    for seed in range(25):
        step(model, optimizer, seed)
    prepared = prepare_qat(model.eval(), EXAMPLE)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    optimizer = sgd(prepared, lr=0.005)
    for seed in range(3):
        step(prepared, optimizer, seed)
    freeze_observers(prepared)
    return model, prepared


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    paths = {"float": folder / "model.onnx", "int8": folder / "model.int8.onnx"}
    for model, path in zip(trained, paths.values(), strict=True):
        export_onnx(model, EXAMPLE, path, metadata=METADATA)
    return paths


def run(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": batch.numpy()})[0]


def layers_of(model: nn.Module) -> tuple[int, int]:
    kinds = [type(module).__mro__ for module in model.modules()]
    return sum(nn.Conv2d in kind for kind in kinds), sum(nn.Linear in kind for kind in kinds)


def test_float_file_agrees_with_network(trained, files):
    agreement = check_onnx(files["float"], trained[0], [images(300, seed=50)])
    assert agreement.num_samples == 300
    assert agreement.agreement == 1
    assert agreement.max_logit_difference < 1e-4


def test_int8_file_agrees_with_prepared_network(trained, files):
    prepared = trained[1]
    batch, labels = images(300, seed=50)
    agreement = check_onnx(files["int8"], prepared, [(batch, labels)])
    with torch.no_grad():
        logits = prepared.eval()(batch)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9  # the comparison is about classes, not about noise
    assert agreement.agreement >= 0.99
    assert agreement.max_logit_difference < 0.05 * logits.std()


def test_check_detects_file_of_another_network(files):
    agreement = check_onnx(files["float"], build("residual", seed=3), [images(100)])
    assert agreement.agreement < 0.9
    assert agreement.max_logit_difference > 0.1


def test_int8_graph_is_fully_fused(trained, files):
    num_convs, num_linears = layers_of(trained[1])
    counts = op_counts(files["int8"])
    assert counts["QLinearConv"] == num_convs
    assert counts["QGemm"] == num_linears
    assert counts["QLinearAdd"] == 3
    assert counts["QuantizeLinear"] == 1 and "DequantizeLinear" not in counts
    assert not FLOAT_WORK & counts.keys()


@pytest.mark.parametrize("name", ["depthwise", "preactivation", "plain"])
def test_other_networks_are_fused_and_agree(name, tmp_path):
    prepared = prepare_qat(build(name), EXAMPLE)
    if name == "plain":
        with torch.no_grad():  # dead channels, and one whose bias would overflow int32 beside its weights
            prepared.get_submodule("stage1.0").weight[2:4] = 0
            prepared.get_submodule("stage1.0").bias[3] = 0
            prepared.get_submodule("stage2.0").weight[1] *= 1e-9
            prepared.get_submodule("stage2.0").bias[1] = 50
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    path = tmp_path / "model.onnx"
    export_onnx(prepared, EXAMPLE, path, metadata={})
    counts = op_counts(path)
    assert (counts["QLinearConv"], counts["QGemm"]) == layers_of(prepared)
    assert counts["QuantizeLinear"] == 1 and "DequantizeLinear" not in counts
    assert not FLOAT_WORK & counts.keys()
    batch, labels = images(200, seed=50)
    with torch.no_grad():
        logits = prepared.eval()(batch)
    agreement = check_onnx(path, prepared, [(batch, labels)])
    assert agreement.agreement >= 0.98
    assert agreement.max_logit_difference < 0.1 * logits.std()


class Stem(nn.Module):
    """The first convolution of ResNets and a classifier; `also` reads the images too."""

    def __init__(self, kernel_size: int = 7, also: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, kernel_size, 2, kernel_size // 2)
        self.also = nn.Conv2d(3, 16, 1, 2) if also else None
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        maps = self.conv(x) if self.also is None else self.conv(x) + self.also(x)
        return self.fc(maps.relu().mean((2, 3)))


def stem_file(path, model, size: int = 16, exclude=()):
    """Write the INT8 file of a network over images [B, 3, size, size]; return the prepared network and 50 images."""
    batch = torch.randn(50, 3, size, size, generator=torch.Generator().manual_seed(0))
    prepared = prepare_qat(model, batch[:1], exclude)
    calibrate(prepared, [batch])
    export_onnx(prepared, batch[:1], path, metadata={})
    return prepared.eval(), batch


def test_resnet_stem_is_folded_with_identical_logits(tmp_path, monkeypatch):
    torch.manual_seed(0)
    size = 18
    model = Stem()
    prepared, batch = stem_file(tmp_path / "folded.onnx", model, size)
    monkeypatch.setattr(onnx_file, "fold_stem", lambda proto: None)
    stem_file(tmp_path / "plain.onnx", model, size)
    assert "SpaceToDepth" not in op_counts(tmp_path / "plain.onnx")
    counts = op_counts(tmp_path / "folded.onnx")
    assert (counts["SpaceToDepth"], counts["QLinearConv"], counts["QuantizeLinear"]) == (1, 1, 1)
    assert np.array_equal(run(tmp_path / "folded.onnx", batch), run(tmp_path / "plain.onnx", batch))
    proto = onnx.load(tmp_path / "folded.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert any(node.name.startswith("conv/") for node in proto.graph.node if node.op_type == "SpaceToDepth")
    clause = first_divergence(tmp_path / "folded.onnx", prepared, batch)
    assert clause.startswith("no layer's output differs")


@pytest.mark.parametrize(
    ("model", "size", "exclude"),
    [(Stem(), 15, []), (Stem(also=True), 16, [])],
)
def test_other_stems_are_not_folded(model, size, exclude, tmp_path):
    prepared, batch = stem_file(tmp_path / "model.onnx", model, size, exclude)
    assert "SpaceToDepth" not in op_counts(tmp_path / "model.onnx")
    assert check_onnx(tmp_path / "model.onnx", prepared, [(batch, torch.zeros(len(batch)))]).agreement >= 0.98


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_logits_do_not_depend_on_batch_size(files, kind):
    batch, _ = images(7)
    together = run(files[kind], batch)
    assert together.shape == (7, NUM_CLASSES)
    alone = np.concatenate([run(files[kind], batch[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4)


def test_weights_are_int8_and_biases_int32(trained, files):
    proto = onnx.load(files["int8"])
    sizes = {onnx.TensorProto.INT8: 0, onnx.TensorProto.INT32: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in proto.graph.initializer:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    layers = [module for module in trained[1].modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    num_outputs = sum(len(layer.weight) for layer in layers)
    assert sizes[onnx.TensorProto.INT8] >= sum(layer.weight.numel() for layer in layers)
    assert num_outputs <= sizes[onnx.TensorProto.INT32] <= 2 * num_outputs  # biases, and their zero points
    assert sizes[onnx.TensorProto.FLOAT] <= 2 * num_outputs + 64  # scales alone
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert not any(node.op_type == "QuantizeLinear" and "weight" in node.input[0] for node in proto.graph.node)


def test_file_has_inputs_outputs_and_metadata(files):
    session = onnxruntime.InferenceSession(str(files["int8"]), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape[1:]) for value in session.get_inputs()] == [("images", [3, 8, 8])]
    assert [(value.name, value.shape[1:]) for value in session.get_outputs()] == [("logits", [NUM_CLASSES])]
    assert session.get_inputs()[0].shape[0] == "batch"
    assert session.get_modelmeta().custom_metadata_map == METADATA


def test_equal_networks_give_equal_bytes_without_local_paths(trained, files, tmp_path):
    again = tmp_path / "elsewhere.onnx"
    export_onnx(trained[1], torch.ones(4, 3, 8, 8), again, metadata=METADATA)
    content = again.read_bytes()
    assert content == files["int8"].read_bytes()
    for trace in (b"/work", b"site-packages", b".py", str(tmp_path).encode()):
        assert trace not in content


def test_export_is_silent_and_leaves_network_unchanged(tmp_path, capfd, caplog):
    model = build("plain").train()
    model.stage1.eval()
    captured = []
    model.fc.register_forward_hook(lambda *_: captured.append(1))
    export_onnx(model, EXAMPLE, tmp_path / "model.onnx", metadata={})
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    assert not captured
    assert model.training and not model.stage1.training
    assert logging.root.manager.disable == logging.NOTSET


def test_uncalibrated_network_is_not_exported(tmp_path):
    with pytest.raises(ModelError, match="calibrate the model first"):
        export_onnx(prepare_qat(build("plain"), EXAMPLE), EXAMPLE, tmp_path / "model.onnx", metadata={})
    assert not list(tmp_path.iterdir())


class BatchOfTwo(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "sentence"), [(BatchOfTwo(), "batch size"), (Deciding(), r"for inputs \[batch, 3, 8, 8\]: \w+")]
)
def test_failed_export_keeps_the_earlier_file(model, sentence, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ModelError, match=rf"cannot be exported to ONNX.*{sentence}") as raised:
        export_onnx(model, EXAMPLE, path, metadata={})
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"earlier"


def test_missing_folder_is_an_error(trained, tmp_path):
    with pytest.raises(ModelError, match=r"cannot be written: No such file"):
        export_onnx(nn.Flatten(), EXAMPLE, tmp_path / "absent" / "model.onnx", metadata={})


def test_invalid_onnx_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no ONNX file at"):
        op_counts(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        check_onnx(tmp_path / "text.onnx", build("plain"), [images(1)])


@pytest.mark.parametrize(("kind", "opset"), [("float", 21), ("int8", 14)])
def test_file_has_requested_opset_and_agrees(trained, tmp_path, kind, opset):
    model, path = trained[kind == "int8"].eval(), tmp_path / "model.onnx"
    export_onnx(model, EXAMPLE, path, metadata=METADATA, opset=opset)
    assert [(opset_id.domain, opset_id.version) for opset_id in onnx.load(path).opset_import] == [("", opset)]
    assert check_onnx(path, model, [images(100, seed=50)]).agreement >= 0.99
    assert (kind == "float") or ("QLinearConv" in (counts := op_counts(path)) and not FLOAT_WORK & counts.keys())
    assert run(path, images(1)[0]).shape == (1, NUM_CLASSES)
    assert onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map == METADATA


@pytest.mark.parametrize(
    ("kind", "opset", "sentence"),
    [
        ("float", 17, r"cannot be written with opset 17 \(compress.opset\)"),
        ("int8", 12, r"cannot be written with opset 12 \(compress.opset\)"),
        ("float", 99, r"with opset 99 \(compress.opset\)"),
    ],
)
def test_impossible_opset_is_an_error(trained, tmp_path, kind, opset, sentence):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ModelError, match=sentence):
        export_onnx(trained[kind == "int8"], EXAMPLE, path, metadata={}, opset=opset)
    assert path.read_bytes() == b"earlier"


def test_unwritable_folder_is_an_error_and_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ModelError, match=rf"{path / 'model.onnx'} cannot be written: Not a directory\."):
        export_onnx(nn.Flatten(), EXAMPLE, path / "model.onnx", metadata={})

    def refuse(_path, *_parts):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(onnx_file, "write_with_sum", refuse)
    with pytest.raises(ModelError, match=rf"{path} cannot be written: Permission denied\."):
        export_onnx(nn.Flatten(), EXAMPLE, path, metadata={})
    assert path.read_bytes() == b"earlier"


def test_node_names_begin_with_module_paths(files):
    by_weight = {
        name.removesuffix(".weight"): node.name
        for node in onnx.load(files["float"]).graph.node
        for name in node.input
        if name.endswith(".weight") and node.op_type == "Gemm"
    }
    assert by_weight == {"fc": "fc/node_linear"}
    names = [node.name for node in onnx.load(files["int8"]).graph.node]
    assert len(set(names)) == len(names)
    assert any(name.startswith("layer2.0.shortcut.0/") for name in names)
