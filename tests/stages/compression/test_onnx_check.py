"""A file is held against its network on as many images as there are, and the place where they part is named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_nets import EXAMPLE, build, images, sgd, step
from torch import nn

from stages.compression.onnx_check import check_onnx, where_they_part
from stages.compression.onnx_file import export_onnx
from stages.compression.quantize import calibrate, prepare_qat
from stages.errors import ModelError


@pytest.fixture(scope="module")
def networks():
    """A float network and the same prepared for INT8, both in eval mode, by kind."""
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
    """damaged(kind, initializer, change): the file with the values of one initializer changed."""

    def damage(kind, initializer, change):
        proto = onnx.load(files[kind])
        tensor = next(each for each in proto.graph.initializer if each.name == initializer)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), initializer))
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return damage


def in_batches(num_samples, size):
    batch, labels = images(num_samples, seed=50)
    return zip(batch.split(size), labels.split(size), strict=True)


def test_a_test_set_is_checked_batch_by_batch_and_both_accuracies_are_told(networks, files):
    whole, labels = images(70, seed=50)
    found = check_onnx(files["float"], networks["float"], in_batches(70, 30))
    with torch.no_grad():
        accuracy = float((networks["float"](whole).argmax(dim=1) == labels).double().mean())
    assert (found.num_samples, found.top1_agreement) == (70, 1)
    assert found.accuracy == found.torch_accuracy == pytest.approx(accuracy)
    assert found.max_logit_difference == check_onnx(files["float"], networks["float"], whole, 30).max_logit_difference


def test_images_without_labels_give_no_accuracy(networks, files):
    found = check_onnx(files["float"], networks["float"], [(images(10)[0], None)])
    assert (found.num_samples, found.accuracy, found.torch_accuracy) == (10, None, None)


def test_a_wrong_file_has_an_accuracy_of_its_own(files):
    other = build("residual", seed=3).eval()
    batch, _ = images(200, seed=50)
    with torch.no_grad():
        answers = other(batch).argmax(dim=1)
    found = check_onnx(files["float"], other, [(batch[:100], answers[:100]), (batch[100:], answers[100:])])
    assert found.torch_accuracy == 1
    assert found.accuracy == found.top1_agreement < 0.9


def test_a_check_leaves_the_network_in_its_mode_and_its_hooks_in_peace(networks, files):
    model, heard = build("residual").train(), []
    model.layer1.eval()
    model.fc.register_forward_hook(lambda *_: heard.append(1))
    means = [module.running_mean.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    check_onnx(files["float"], model, images(10)[0])
    where_they_part(files["float"], model, images(10)[0])
    assert model.training and not model.layer1.training and not heard
    after = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(*pair) for pair in zip(means, after, strict=True))
    assert torch.backends.cudnn.allow_tf32


def test_a_logit_that_is_no_number_is_not_lost(networks, damaged):
    path = damaged("float", "fc.bias", lambda values: values * np.nan)
    assert np.isnan(check_onnx(path, networks["float"], in_batches(20, 10)).max_logit_difference)
    assert where_they_part(path, networks["float"], images(10)[0]).startswith("at the logits 100 %")


def test_a_check_without_images_or_without_a_file_is_told(networks, files, tmp_path):
    with pytest.raises(ValueError, match="without images"):
        check_onnx(files["float"], networks["float"], [])
    with pytest.raises(ModelError, match="no ONNX file"):
        check_onnx(tmp_path / "absent.onnx", networks["float"], in_batches(10, 10))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_right_file_parts_from_its_network_nowhere(networks, files, kind):
    said = where_they_part(files[kind], networks[kind], images(30)[0])
    assert said == "nowhere on these images" or said.startswith("at no single operation")


@pytest.fixture(scope="module")
def with_dead_channels():
    """A trained network, prepared: half the channels of its depthwise convolution read zeros alone, and its batch norm
    divides them by a standard deviation that is next to nothing."""
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


def test_a_file_with_dead_channels_parts_from_its_network_nowhere(with_dead_channels, tmp_path):
    export_onnx(with_dead_channels, EXAMPLE, tmp_path / "model.onnx", metadata={})
    said = where_they_part(tmp_path / "model.onnx", with_dead_channels, images(30)[0])
    assert said == "nowhere on these images" or said.startswith("at no single operation")
    found = check_onnx(tmp_path / "model.onnx", with_dead_channels, in_batches(300, 100))
    assert found.top1_agreement >= 0.99
    assert found.accuracy == pytest.approx(found.torch_accuracy, abs=0.01)


@pytest.mark.parametrize("layer", ["stem.0", "layer1.1.conv2", "layer2.0.shortcut.0"])
def test_the_layer_of_a_float_file_whose_weight_is_wrong_is_named(networks, damaged, layer):
    path = damaged("float", f"{layer}.weight", lambda values: values * 1.1)
    said = where_they_part(path, networks["float"], images(30)[0])
    assert said.startswith(f"at {layer} (Conv) ")
    assert "% of the values differ" in said and "\n" not in said


@pytest.mark.parametrize("layer", ["stem.0", "layer1.1.conv2", "layer2.0.shortcut.0"])
def test_the_layer_of_an_int8_file_whose_weight_is_wrong_is_named(networks, damaged, layer):
    def one_channel(weights):
        weights = weights.copy()
        weights[5] = -weights[5]
        return weights

    path = damaged("int8", f"{layer}.weights.weight", one_channel)
    said = where_they_part(path, networks["int8"], images(30)[0])
    assert said.startswith(f"at {layer} (Conv) ")
    assert "quantization steps" in said and "\n" not in said
    share = float(said.partition("(Conv) ")[2].partition(" %")[0])
    assert 0 < share <= 100 / 16  # one channel of 16 or 24, and not what that does to everything behind it


def test_a_rounding_of_an_int8_file_that_has_another_scale_is_named_by_what_it_rounds(networks, files, damaged):
    nodes = onnx.load(files["int8"]).graph.node
    rounding = next(node for node in nodes if node.name.startswith("layer1.0.conv2/node_quantize"))
    path = damaged("int8", rounding.input[1], lambda scale: scale * 1.2)
    assert where_they_part(path, networks["int8"], images(30)[0]).startswith("at layer1.0.conv2 (Conv) ")


def test_a_wrong_last_layer_shows_in_the_logits(networks, damaged):
    path = damaged("int8", "fc.weights.bias", lambda values: values + 5000)
    assert where_they_part(path, networks["int8"], images(30)[0]).startswith("at the logits ")


def test_a_file_of_another_network_parts_at_its_first_layer(networks, files):
    other = prepare_qat(build("residual", seed=3).eval(), EXAMPLE)
    calibrate(other, [images(20, seed)[0] for seed in range(3)])
    assert where_they_part(files["int8"], other.eval(), images(30)[0]).startswith("at stem.0 (Conv) ")
