"""Tests of the choice of layers whose weights have 4 bits."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.bit_widths import choose_int4
from kdpipe.stages.compress.quantization.qat import calibrate, int4_candidates, prepare_qat
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import ModelError, RecipeError

BATCHES = [images(30, seed)[0] for seed in range(2)]


def chosen(budget: float, batches=BATCHES, **kwargs):
    model = build("residual").eval()
    prepared = prepare_qat(model, EXAMPLE)
    return prepared, *choose_int4(prepared, int4_candidates(model, EXAMPLE), batches, budget=budget, **kwargs)


def weights(prepared, paths) -> int:
    return sum(prepared.get_submodule(path).weight.numel() for path in paths)


def test_budget_is_met_by_the_cheapest_layers():
    prepared, layers, harms = chosen(0.75)
    candidates = int4_candidates(build("residual").eval(), EXAMPLE)
    whole = weights(prepared, [*candidates, "stem.0", "fc"])
    assert harms.keys() == set(candidates)
    assert whole - weights(prepared, layers) / 2 <= 0.75 * whole < whole - weights(prepared, layers[:-1]) / 2
    cost = {path: harms[path] / weights(prepared, [path]) for path in candidates}
    assert layers == sorted(candidates, key=cost.get)[: len(layers)]
    assert 0 < len(layers) < len(candidates)
    assert {module.bits for module in prepared.modules() if hasattr(module, "bits")} == {8}


def test_harm_is_the_increase_of_the_divergence():
    _, _, harms = chosen(0.9)
    model, everything = build("residual").eval(), torch.cat(BATCHES)

    def divergence(int4) -> float:
        prepared = prepare_qat(model, EXAMPLE, int4=int4)
        calibrate(prepared, BATCHES)
        with torch.no_grad():
            logits = [network.eval()(everything).double().log_softmax(dim=1) for network in (prepared, model)]
        return float(F.kl_div(*logits, log_target=True, reduction="batchmean"))

    for path in ("layer1.0.conv1", "layer2.0.conv2"):
        increase = divergence([path]) - divergence([])
        assert harms[path] == pytest.approx(increase, rel=0.02, abs=1e-7)


def test_choice_is_repeatable_and_can_be_stopped():
    assert chosen(0.75)[1:] == chosen(0.75)[1:]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chosen(0.75, on_progress=stop)


def test_wrong_budgets_are_refused():
    with pytest.raises(ModelError, match=r"budget = 0.4 cannot be reached: .* take 0\.\d+ of their bytes"):
        chosen(0.4)
    with pytest.raises(ModelError, match="no batch"):
        chosen(0.75, batches=[])
    with pytest.raises(RecipeError, match="budget is for scheme = 'w4a8'"):
        QuantizeConfig(budget=0.75)
