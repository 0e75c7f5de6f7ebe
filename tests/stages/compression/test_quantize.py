"""A prepared network computes on INT8 grids, and is otherwise the network that it was: paths, hooks, state, modes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_nets import CONTAINERS, EXAMPLE, NETS, NUM_CLASSES, UNPRUNABLE, Residual, build, images, sgd, step
from torch import nn

from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import (
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
from stages.compression.int8_graph import int8_graph
from stages.compression.quantize import calibrate, freeze_observers, prepare_qat, trace_folded
from stages.errors import ModelError
from stages.models.module_path import module_named
from stages.tensor_file import load_tensors, save_tensors


def batches(count: int = 3):
    return [images(20, seed)[0] for seed in range(count)]


def prepared_and_calibrated(name: str, seed: int = 0):
    prepared = prepare_qat(build(name, seed), EXAMPLE)
    calibrate(prepared, batches())
    return prepared


def heard_at(model: nn.Module, paths: list[str], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What forward hooks at `paths` hear for a batch."""
    heard = {}
    for path in paths:
        module_named(model, path).register_forward_hook(
            lambda module, inputs, output, path=path: heard.__setitem__(path, output.detach().clone())
        )
    with torch.no_grad():
        model(batch)
    return heard


def rounding_layers(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {path: one for path, one in model.named_modules() if isinstance(one, QuantConv2d | QuantLinear)}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
def test_without_rounding_it_computes_what_the_float_network_computes(name):
    model = build(name).eval()
    prepared = prepare_qat(model, EXAMPLE)
    set_rounding(prepared, False)
    batch, _ = images(6)
    torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_with_rounding_it_stays_near(name):
    model, prepared = build(name).eval(), prepared_and_calibrated(name).eval()
    batch, _ = images(50, seed=7)
    with torch.no_grad():
        assert 0 < relative_error(prepared(batch), model(batch)) < 0.05


@pytest.mark.parametrize("name", [name for name in NETS if CONTAINERS[name]])
def test_hooks_on_blocks_and_stages_hear_the_outputs_of_those(name):
    batch, _ = images(20, seed=7)
    model, prepared = build(name).eval(), prepared_and_calibrated(name).eval()
    wanted, found = (heard_at(one, CONTAINERS[name], batch) for one in (model, prepared))
    for path in CONTAINERS[name]:
        assert relative_error(found[path], wanted[path]) < 0.05, path


def test_hooks_on_single_layers_hear_them_too():
    batch, _ = images(20, seed=7)
    paths = ["layer1.0.bn1", "layer1.0.relu", "layer2.0.shortcut.1", "stem.2", "fc"]
    model, prepared = build("residual").eval(), prepared_and_calibrated("residual").eval()
    wanted, found = (heard_at(one, paths, batch) for one in (model, prepared))
    for path in paths:
        assert relative_error(found[path], wanted[path]) < 0.05, path


def test_a_hook_on_a_stage_lets_gradients_through():
    prepared = prepared_and_calibrated("residual").train()
    heard = []
    prepared.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: heard.append(output))
    prepared(images(4)[0])
    heard[0].square().mean().backward()
    assert prepared.get_submodule("layer1.0.conv1").weight.grad.abs().sum() > 0
    assert prepared.get_submodule("layer2.0.conv1").weight.grad is None


@pytest.mark.parametrize("name", NETS)
def test_the_original_stays_and_its_hooks_stay_with_it(name):
    model = build(name).train()
    heard = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: heard.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare_qat(model, EXAMPLE)
    prepared(images(3)[0])
    assert not heard
    assert model.training and prepared.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_every_path_of_the_original_is_there_and_every_parameter_learns(name):
    model = build(name)
    prepared = prepare_qat(model, EXAMPLE)
    assert {path for path, _ in model.named_modules()} <= {path for path, _ in prepared.named_modules()}
    calibrate(prepared, batches())
    step(prepared, sgd(prepared), seed=1)
    assert all(parameter.grad is not None for parameter in prepared.parameters())


@pytest.mark.parametrize("name", [*NETS, *UNPRUNABLE])
def test_all_arithmetic_reads_and_writes_grids_and_the_logits_are_float(name):
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


def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path):
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
    wanted, found = first.state_dict(), second.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_frozen_ranges_stay_and_stay_frozen_after_a_reload():
    prepared = prepared_and_calibrated("residual")
    step(prepared, sgd(prepared), seed=1)
    freeze_observers(prepared)
    ranges = {path: (float(q.low), float(q.high)) for path, q in quantizers_of(prepared).items()}
    reloaded = prepare_qat(build("residual", seed=5), EXAMPLE)
    reloaded.load_state_dict(prepared.state_dict(), strict=True)
    reloaded.train()(100 * images(20)[0])
    assert {path: (float(q.low), float(q.high)) for path, q in quantizers_of(reloaded).items()} == ranges


def test_training_moves_the_ranges_until_they_are_frozen():
    prepared = prepared_and_calibrated("residual").train()
    quantizer = next(iter(quantizers_of(prepared).values()))
    before = float(quantizer.high)
    prepared(100 * images(20)[0])
    moved = float(quantizer.high)
    prepared.eval()(1000 * images(20)[0])
    assert before < moved == float(quantizer.high)


def test_calibration_takes_the_mean_of_the_batches_and_always_zero():
    quantizer = ActivationQuantizer()
    model = nn.Sequential(quantizer).eval()
    calibrate(model, [torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 6.0]), torch.tensor([2.0, 2.0])])
    assert float(quantizer.low) == pytest.approx((0 - 2 + 0) / 3)
    assert float(quantizer.high) == pytest.approx((4 + 6 + 2) / 3)
    assert not model.training and not quantizer.training


def test_calibration_sees_no_dropout_and_leaves_the_mode():
    ranges = []
    for seed in range(2):
        prepared = prepare_qat(build("plain").train(), EXAMPLE)
        torch.manual_seed(seed)
        calibrate(prepared, batches())
        ranges.append([float(quantizer.high) for quantizer in quantizers_of(prepared).values()])
        assert all(module.training for module in prepared.modules())
    assert ranges[0] == ranges[1]


def test_zero_is_exact_and_what_lies_outside_is_clipped_and_has_no_gradient():
    quantizer = ActivationQuantizer()
    calibrate(nn.Sequential(quantizer), [torch.tensor([-1.0, 3.0])])
    x = torch.tensor([-5.0, -0.7, 0.0, 2.0, 9.0], requires_grad=True)
    rounded = quantizer.eval()(x)
    rounded.sum().backward()
    assert rounded[2] == 0
    torch.testing.assert_close(rounded, torch.tensor([-1.0, -0.7, 0.0, 2.0, 3.0]), atol=4 / 255, rtol=0)
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_a_quantizer_that_has_seen_nothing_says_nan():
    prepared = prepare_qat(build("plain"), EXAMPLE).eval()
    assert prepared(images(2)[0]).isnan().all()
    with pytest.raises(ModelError, match=r"'quantizers\.\w+' has seen no batch yet"):
        freeze_observers(prepared)
    with pytest.raises(ModelError, match="no batch"):
        calibrate(prepared, [])


def test_a_dead_channel_is_finite_and_its_gradients_too():
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
def test_weights_and_biases_are_rounded_to_the_integers_of_the_file(name):
    prepared = prepare_qat(build(name), EXAMPLE)
    first, *_, last = rounding_layers(prepared).values()
    with torch.no_grad():
        first.weight[1] *= 300  # large steps beside its bias: what folding gives a channel that is always zero
        last.weight[1] *= 1e-3  # counted in steps of its own, this weight would have the bias overflow an int32
        last.bias[1] = 500
    calibrate(prepared, batches())
    graph = int8_graph(prepared)
    for path, layer in rounding_layers(prepared).items():
        held = graph.get_submodule(path).weights
        weight, bias = rounded_parameters(layer)
        assert torch.equal(weight, held()[0]), path
        if layer.bias is None:
            assert bias is None
            continue
        assert held.bias.dtype == torch.int32, path
        assert torch.equal(bias, (held.bias.double() * held.bias_scale).float()), path
        assert torch.equal(rounded_parameters(layer.train())[1], bias)
    assert first.bias is None or (rounded_parameters(first)[1] - first.bias)[1].abs() > 1e-6


def test_a_rounded_bias_learns_as_if_it_were_not_rounded():
    layer = rounding_layers(prepared_and_calibrated("plain"))["stage1.0"]
    layer(images(4)[0]).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((16,), 4.0 * 8 * 8))


def test_a_bias_follows_the_range_of_its_inputs_and_knows_none_before_there_is_one():
    prepared = prepare_qat(build("plain"), EXAMPLE).eval()
    layer = rounding_layers(prepared)["stage1.0"]
    assert rounded_parameters(layer)[1].isnan().all()
    calibrate(prepared, batches())
    layer.input_grid[0].high.fill_(1e6)
    assert (rounded_parameters(layer)[1] - layer.bias).abs().max() > 1e-2
    set_rounding(prepared, False)
    assert rounded_parameters(layer)[1] is layer.bias


def test_the_ranges_that_layers_read_add_no_key_and_no_path():
    state = prepare_qat(build("residual"), EXAMPLE).state_dict()
    folded = trace_folded(build("residual"), EXAMPLE).state_dict()
    assert [key for key in state if not key.startswith("quantizers.")] == list(folded)


@pytest.mark.parametrize("copied", [copy.deepcopy, bare_copy])
def test_a_copy_reads_its_own_ranges(copied):
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


def test_the_grids_do_not_go_down_to_bfloat16():
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


class TwoHeads(Residual):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Deciding())), r"module '1\.1' \(Deciding\)"),
        (Deciding(), r"its forward \(Deciding\)"),
        (TwoHeads(), "one tensor of logits"),
        (nn.Conv2d(7, 4, 3), r"does not run on an input of shape \[1, 3, 8, 8\]"),
    ],
)
def test_what_cannot_be_quantized_is_told_in_a_sentence(model, sentence):
    with pytest.raises(ModelError, match=sentence) as raised:
        prepare_qat(model, EXAMPLE)
    assert "\n" not in str(raised.value)


def test_a_prepared_network_is_not_prepared_again():
    with pytest.raises(ModelError, match="prepared before"):
        prepare_qat(prepare_qat(build("plain"), EXAMPLE), EXAMPLE)


def test_a_float_network_has_nothing_to_calibrate():
    with pytest.raises(ModelError, match="prepare_qat first"):
        calibrate(build("plain"), batches())


def test_a_layer_called_twice_keeps_its_weights_and_its_batch_norms_apart():
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
