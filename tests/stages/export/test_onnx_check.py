"""Tests of comparing a file with its network, and of locating the first divergence."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.tiny_nets import EXAMPLE, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export import onnx_check
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_debug import first_divergence
from kdpipe.stages.export.onnx_export import export_onnx


@pytest.fixture(scope="module")
def networks():
    """Return a float network and the same prepared for INT8, both in eval mode, by kind."""
    model = build("residual").eval()
    prepared = prepare_qat(model, EXAMPLE)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    return {"float": model, "int8": prepared.eval()}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    for kind, model in networks.items():
        export_onnx(model, EXAMPLE, folder / f"{kind}.onnx", metadata={})
    return {kind: folder / f"{kind}.onnx" for kind in networks}


@pytest.fixture
def damaged(files, tmp_path):
    """Return damage(kind, initializer, change), which writes a file with one initializer changed."""

    def damage(kind, initializer, change):
        proto = onnx.load(files[kind])
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == initializer)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), initializer))
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return damage


def in_batches(num_samples, size):
    batch, labels = images(num_samples, seed=50)
    return zip(batch.split(size), labels.split(size), strict=True)


def test_check_runs_batch_by_batch_with_both_accuracies(networks, files):
    whole, labels = images(70, seed=50)
    found = check_onnx(files["float"], networks["float"], in_batches(70, 30))
    with torch.no_grad():
        accuracy = float((networks["float"](whole).argmax(dim=1) == labels).double().mean())
    assert (found.num_samples, found.agreement) == (70, 1)
    assert found.accuracy == found.torch_accuracy == pytest.approx(accuracy)
    assert (
        found.max_logit_difference
        == check_onnx(files["float"], networks["float"], [(whole, labels)]).max_logit_difference
    )


def test_check_halves_batches_that_do_not_fit_into_memory(networks, files, monkeypatch):
    batch, warnings, open_whole = images(70, seed=50), [], onnx_check.open_file

    class SmallSession:
        def __init__(self, path):
            self.whole = open_whole(path)

        def run(self, outputs, inputs):
            if len(inputs["images"]) > 20:
                raise MemoryError
            return self.whole.run(outputs, inputs)

    whole = check_onnx(files["float"], networks["float"], [batch])
    monkeypatch.setattr(onnx_check, "open_file", SmallSession)
    found = check_onnx(files["float"], copy.deepcopy(networks["float"]), [batch], warnings.append)
    assert found.max_logit_difference == pytest.approx(whole.max_logit_difference, abs=1e-5)
    assert (found.num_samples, found.accuracy) == (70, whole.accuracy)
    assert warnings == ["out of memory with batches of 70: continuing with 18."]


def test_wrong_file_has_its_own_accuracy(files):
    other = build("residual", seed=3).eval()
    batch, _ = images(200, seed=50)
    with torch.no_grad():
        answers = other(batch).argmax(dim=1)
    found = check_onnx(files["float"], other, [(batch[:100], answers[:100]), (batch[100:], answers[100:])])
    assert found.torch_accuracy == 1
    assert found.accuracy == found.agreement < 0.9


def test_check_leaves_mode_and_hooks_unchanged(networks, files):
    model, captured = build("residual").train(), []
    model.layer1.eval()
    model.fc.register_forward_hook(lambda *_: captured.append(1))
    means = [module.running_mean.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    check_onnx(files["float"], model, [images(10)])
    first_divergence(files["float"], model, images(10)[0])
    assert model.training and not model.layer1.training and not captured
    after = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(*pair) for pair in zip(means, after, strict=True))
    assert torch.backends.cudnn.allow_tf32


def test_nan_logits_are_reported(networks, damaged):
    path = damaged("float", "fc.bias", lambda values: values * np.nan)
    assert np.isnan(check_onnx(path, networks["float"], in_batches(20, 10)).max_logit_difference)
    assert first_divergence(path, networks["float"], images(10)[0]).startswith("the output of fc (Gemm) differs")


def test_check_without_file_is_an_error(networks, tmp_path):
    with pytest.raises(ModelError, match="no ONNX file"):
        check_onnx(tmp_path / "absent.onnx", networks["float"], in_batches(10, 10))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_correct_file_has_no_divergence(networks, files, kind):
    assert first_divergence(files[kind], networks[kind], images(30)[0]).startswith("no layer's output differs")


@pytest.fixture(scope="module")
def dead_channel_network():
    """Return a trained and prepared network with dead channels.

    Half the channels of its depthwise convolution read only zeros, and its batch norm divides them by almost zero.
    """
    model = build("depthwise")
    optimizer = sgd(model)
    for seed in range(15):
        step(model, optimizer, seed)
    with torch.no_grad():
        model.expand[1].weight[:16], model.expand[1].bias[:16] = 0, -1
        model.depthwise[0].weight[:16] *= 10
        model.depthwise[1].running_mean[:16], model.depthwise[1].running_var[:16] = 0, 1e-40
        model.depthwise[1].bias[:16] = torch.linspace(0.1, 0.6, 16)
    prepared = prepare_qat(model.eval(), EXAMPLE)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    return prepared.eval()


def test_file_with_dead_channels_has_no_divergence(dead_channel_network, tmp_path):
    export_onnx(dead_channel_network, EXAMPLE, tmp_path / "model.onnx", metadata={})
    clause = first_divergence(tmp_path / "model.onnx", dead_channel_network, images(30)[0])
    assert clause.startswith("no layer's output differs")
    found = check_onnx(tmp_path / "model.onnx", dead_channel_network, in_batches(300, 100))
    assert found.agreement >= 0.99
    assert found.accuracy == pytest.approx(found.torch_accuracy, abs=0.01)


@pytest.mark.parametrize("layer", ["stem.0", "layer1.1.conv2", "layer2.0.shortcut.0"])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_wrong_weight_is_located(networks, damaged, kind, layer):
    def change(weights):
        weights = weights.copy()
        weights[5] = -weights[5]
        return weights

    path = damaged(kind, f"{layer}.weight" if kind == "float" else f"{layer}.weights.weight", change)
    clause = first_divergence(path, networks[kind], images(30)[0])
    assert clause.startswith(f"the output of {layer} (Conv) differs by ") and "\n" not in clause


def test_wrong_last_layer_is_located(networks, damaged):
    path = damaged("int8", "fc.weights.bias", lambda values: values + 5000)
    assert first_divergence(path, networks["int8"], images(30)[0]).startswith("the output of fc (Gemm) differs")


def test_file_of_another_network_diverges_at_first_layer(networks, files):
    other = prepare_qat(build("residual", seed=3).eval(), EXAMPLE)
    calibrate(other, [images(20, seed)[0] for seed in range(3)])
    assert first_divergence(files["int8"], other.eval(), images(30)[0]).startswith("the output of stem.0 (Conv) ")
