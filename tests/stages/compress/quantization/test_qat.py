"""Tests of networks prepared for INT8: grids, paths, hooks, state, modes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_nets import CONTAINERS, EXAMPLE, NETS, NUM_CLASSES, UNPRUNABLE, Residual, build, images, sgd, step
from torch import fx, nn

from kdpipe.stages.compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    input_scale_of,
    quantizers_of,
    round_weight,
    rounded_parameters,
    set_rounding,
    weight_scale,
)
from kdpipe.stages.compress.quantization.qat import calibrate, freeze_observers, prepare_qat, trace_folded
from kdpipe.stages.compress.quantization.qdq_graph import int8_graph
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import get_module
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors


def batches(count: int = 3):
    return [images(20, seed)[0] for seed in range(count)]


def prepared_and_calibrated(name: str, seed: int = 0):
    prepared = prepare_qat(build(name, seed), EXAMPLE)
    calibrate(prepared, batches())
    return prepared


def captured_at(model: nn.Module, paths: list[str], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what forward hooks at `paths` get for a batch."""
    captured = {}
    for path in paths:
        get_module(model, path).register_forward_hook(
            lambda module, inputs, output, path=path: captured.__setitem__(path, output.detach().clone())
        )
    with torch.no_grad():
        model(batch)
    return captured


def rounding_layers(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantConv2d | QuantLinear)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
def test_without_rounding_it_equals_the_float_network(name):
    model = build(name).eval()
    prepared = prepare_qat(model, EXAMPLE)
    set_rounding(prepared, False)
    batch, _ = images(6)
    torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_with_rounding_it_stays_close(name):
    model, prepared = build(name).eval(), prepared_and_calibrated(name).eval()
    batch, _ = images(50, seed=7)
    with torch.no_grad():
        assert 0 < relative_error(prepared(batch), model(batch)) < 0.05


@pytest.mark.parametrize("name", [name for name in NETS if CONTAINERS[name]])
def test_hooks_on_blocks_get_their_outputs(name):
    batch, _ = images(20, seed=7)
    model, prepared = build(name).eval(), prepared_and_calibrated(name).eval()
    expected, found = (captured_at(network, CONTAINERS[name], batch) for network in (model, prepared))
    for path in CONTAINERS[name]:
        assert relative_error(found[path], expected[path]) < 0.05, path


def test_hooks_on_layers_get_their_outputs():
    batch, _ = images(20, seed=7)
    paths = ["layer1.0.bn1", "layer1.0.relu", "layer2.0.shortcut.1", "stem.2", "fc"]
    model, prepared = build("residual").eval(), prepared_and_calibrated("residual").eval()
    expected, found = (captured_at(network, paths, batch) for network in (model, prepared))
    for path in paths:
        assert relative_error(found[path], expected[path]) < 0.05, path


def test_gradients_flow_through_hooked_outputs():
    prepared = prepared_and_calibrated("residual").train()
    captured = []
    prepared.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: captured.append(output))
    prepared(images(4)[0])
    captured[0].square().mean().backward()
    assert prepared.get_submodule("layer1.0.conv1").weight.grad.abs().sum() > 0
    assert prepared.get_submodule("layer2.0.conv1").weight.grad is None


@pytest.mark.parametrize("name", NETS)
def test_original_and_its_hooks_stay_unchanged(name):
    model = build(name).train()
    captured = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: captured.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare_qat(model, EXAMPLE)
    prepared(images(3)[0])
    assert not captured
    assert model.training and prepared.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_all_paths_exist_and_all_parameters_learn(name):
    model = build(name)
    prepared = prepare_qat(model, EXAMPLE)
    assert {path for path, _ in model.named_modules()} <= {path for path, _ in prepared.named_modules()}
    calibrate(prepared, batches())
    step(prepared, sgd(prepared), seed=1)
    assert all(parameter.grad is not None for parameter in prepared.parameters())


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
def test_layers_read_grids_and_logits_are_float(name):
    prepared = prepared_and_calibrated(name).eval()
    layers = [module for module in prepared.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert layers and all(isinstance(layer, QuantConv2d | QuantLinear) for layer in layers)
    read = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        logits = prepared(images(100)[0])
    assert all(len(values.unique()) <= 256 for values in read)
    assert len(logits.unique()) > 256
    for layer in layers:
        rounded = round_weight(layer.weight, weight_scale(layer.weight))
        assert all(len(channel.unique()) <= 255 for channel in rounded)


def test_dropout_and_modes_follow_train_and_eval():
    prepared = prepared_and_calibrated("plain")
    freeze_observers(prepared)
    batch, _ = images(4)
    with torch.no_grad():
        assert torch.equal(prepared.eval()(batch), prepared(batch))
        assert not torch.equal(prepared.train()(batch), prepared(batch))


def test_training_resumes_bit_for_bit_from_state(tmp_path):
    first = prepared_and_calibrated("residual")
    optimizer = sgd(first)
    for seed in range(2):
        step(first, optimizer, seed)
    save_tensors(tmp_path / "state", first.state_dict(), {})
    state = copy.deepcopy(optimizer.state_dict())
    step(first, optimizer, seed=2)

    second = prepare_qat(build("residual", seed=5), EXAMPLE)  # other weights: all that counts must be in the state
    second.load_state_dict(load_tensors(tmp_path / "state")[0], strict=True)
    optimizer = sgd(second)
    optimizer.load_state_dict(state)
    step(second, optimizer, seed=2)
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_frozen_ranges_survive_a_reload():
    prepared = prepared_and_calibrated("residual")
    step(prepared, sgd(prepared), seed=1)
    freeze_observers(prepared)
    ranges = {path: (float(q.low), float(q.high)) for path, q in quantizers_of(prepared).items()}
    reloaded = prepare_qat(build("residual", seed=5), EXAMPLE)
    reloaded.load_state_dict(prepared.state_dict(), strict=True)
    reloaded.train()(100 * images(20)[0])
    assert {path: (float(q.low), float(q.high)) for path, q in quantizers_of(reloaded).items()} == ranges


def test_training_moves_ranges_until_frozen():
    prepared = prepared_and_calibrated("residual").train()
    quantizer = next(iter(quantizers_of(prepared).values()))
    before = float(quantizer.high)
    prepared(100 * images(20)[0])
    moved = float(quantizer.high)
    prepared.eval()(1000 * images(20)[0])
    assert before < moved == float(quantizer.high)


def test_calibration_averages_batches_and_includes_zero():
    quantizer = ActivationQuantizer()
    model = nn.Sequential(quantizer).eval()
    calibrate(model, [torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 6.0]), torch.tensor([2.0, 2.0])])
    assert float(quantizer.low) == pytest.approx((0 - 2 + 0) / 3)
    assert float(quantizer.high) == pytest.approx((4 + 6 + 2) / 3)
    assert not model.training and not quantizer.training


def test_calibration_disables_dropout_and_keeps_modes():
    ranges = []
    for seed in range(2):
        prepared = prepare_qat(build("plain").train(), EXAMPLE)
        torch.manual_seed(seed)
        calibrate(prepared, batches())
        ranges.append([float(quantizer.high) for quantizer in quantizers_of(prepared).values()])
        assert all(module.training for module in prepared.modules())
    assert ranges[0] == ranges[1]


def test_zero_is_exact_and_clipped_values_have_no_gradient():
    quantizer = ActivationQuantizer()
    calibrate(nn.Sequential(quantizer), [torch.tensor([-1.0, 3.0])])
    x = torch.tensor([-5.0, -0.7, 0.0, 2.0, 9.0], requires_grad=True)
    rounded = quantizer.eval()(x)
    rounded.sum().backward()
    assert rounded[2] == 0
    torch.testing.assert_close(rounded, torch.tensor([-1.0, -0.7, 0.0, 2.0, 3.0]), atol=4 / 255, rtol=0)
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_uncalibrated_quantizer_returns_nan():
    prepared = prepare_qat(build("plain"), EXAMPLE).eval()
    assert prepared(images(2)[0]).isnan().all()
    with pytest.raises(ModelError, match=r"'quantizers\.\w+' has seen no batch yet"):
        freeze_observers(prepared)
    with pytest.raises(ModelError, match="no batch"):
        calibrate(prepared, [])


def test_dead_channels_and_their_gradients_are_finite():
    model = build("plain")
    with torch.no_grad():
        model.stage1[0].weight[3] = 0
        model.stage2[0].weight.zero_()
    prepared = prepare_qat(model, EXAMPLE)
    calibrate(prepared, batches())
    step(prepared, sgd(prepared), seed=1)
    assert all(parameter.isfinite().all() for parameter in prepared.parameters())
    assert weight_scale(torch.zeros(2, 3)).tolist() == [2**-20] * 2


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
def test_weights_and_biases_match_the_file_integers(name):
    prepared = prepare_qat(build(name), EXAMPLE)
    first, *_, last = rounding_layers(prepared).values()
    with torch.no_grad():
        first.weight[1] *= 300  # large steps beside its bias: what folding gives a channel that is always zero
        last.weight[1] *= 1e-3  # counted in steps of its own, this weight would have the bias overflow an int32
        last.bias[1] = 500
    calibrate(prepared, batches())
    graph = int8_graph(prepared)
    for path, layer in rounding_layers(prepared).items():
        stored = graph.get_submodule(path).weights
        weight, bias = rounded_parameters(layer)
        assert torch.equal(weight, stored()[0]), path
        if layer.bias is None:
            assert bias is None
            continue
        assert stored.bias.dtype == torch.int32, path
        assert torch.equal(bias, (stored.bias.double() * stored.bias_scale).float()), path
        assert torch.equal(rounded_parameters(layer.train())[1], bias)
    assert first.bias is None or (rounded_parameters(first)[1] - first.bias)[1].abs() > 1e-6


def test_rounded_bias_has_the_float_gradient():
    layer = rounding_layers(prepared_and_calibrated("plain"))["stage1.0"]
    layer(images(4)[0]).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((16,), 4.0 * 8 * 8))


def test_bias_scale_follows_the_input_range():
    prepared = prepare_qat(build("plain"), EXAMPLE).eval()
    layer = rounding_layers(prepared)["stage1.0"]
    assert rounded_parameters(layer)[1].isnan().all()
    calibrate(prepared, batches())
    layer.input_grid[0].high.fill_(1e6)
    assert (rounded_parameters(layer)[1] - layer.bias).abs().max() > 1e-2
    set_rounding(prepared, False)
    assert rounded_parameters(layer)[1] is layer.bias


def test_input_grids_add_no_state_keys():
    state = prepare_qat(build("residual"), EXAMPLE).state_dict()
    folded = trace_folded(build("residual"), EXAMPLE, fx.GraphModule).state_dict()
    assert [key for key in state if not key.startswith("quantizers.")] == list(folded)


@pytest.mark.parametrize("copied", [copy.deepcopy, clone_without_hooks])
def test_copy_uses_its_own_ranges(copied):
    prepared = prepared_and_calibrated("residual").eval()
    batch, _ = images(4)
    with torch.no_grad():
        before = prepared(batch)
        twin = copied(prepared)
        assert torch.equal(twin(batch), before)
        own = set(quantizers_of(twin).values())
        assert all(layer.input_grid[0] in own for layer in rounding_layers(twin).values())
        for quantizer in own:
            quantizer.high.mul_(3)
        assert torch.equal(prepared(batch), before)
    moved = copied(prepared).to("meta")
    assert all(input_scale_of(layer).device.type == "meta" for layer in rounding_layers(moved).values())


def test_grids_stay_float32_under_autocast():
    prepared = prepared_and_calibrated("plain").eval()
    batch, _ = images(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = prepared(batch)
    assert torch.equal(mixed, prepared(batch))
    quantizer = next(iter(quantizers_of(prepared).values()))
    assert torch.equal(quantizer(batch.bfloat16()), quantizer(batch.bfloat16().float()))


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(24, 4, batch_first=True), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.lstm(x.flatten(2).view(-1, 8, 24))[0][:, -1])


class TwoHeads(Residual):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Deciding())), r"module '1\.1' \(Deciding\)"),
        (Deciding(), r"its forward \(Deciding\)"),
        (TwoHeads(), "single tensor of logits"),
        (Recurrent(), r"no layer of it has an INT8 form.* Take 'quantize' out of compress\.steps"),
        (nn.Conv2d(7, 4, 3), r"does not run on an input of shape \[1, 3, 8, 8\]"),
    ],
)
def test_unquantizable_models_are_errors(model, sentence):
    with pytest.raises(ModelError, match=sentence) as raised:
        prepare_qat(model, EXAMPLE)
    assert "\n" not in str(raised.value)


def test_preparing_twice_is_an_error():
    with pytest.raises(ModelError, match="prepared before"):
        prepare_qat(prepare_qat(build("plain"), EXAMPLE), EXAMPLE)


def test_calibrating_a_float_network_is_an_error():
    with pytest.raises(ModelError, match="prepare_qat first"):
        calibrate(build("plain"), batches())


def test_layer_called_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            x = self.stem(x)
            return self.fc(self.bn2(self.conv(self.bn1(self.conv(x)).relu())).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice()
    nn.init.uniform_(model.bn1.weight), nn.init.uniform_(model.bn2.running_mean)
    prepared = prepare_qat(model.eval(), EXAMPLE)
    layers = rounding_layers(prepared)
    calibrate(prepared, batches())
    assert rounded_parameters(layers["conv"])[1] is layers["conv"].bias  # two ranges, so the file has it in float
    assert rounded_parameters(layers["stem"])[1] is not layers["stem"].bias
    assert int8_graph(prepared).get_submodule("conv").weights.bias.dtype == torch.float32
    set_rounding(prepared, False)
    batch, _ = images(4)
    torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-4)
