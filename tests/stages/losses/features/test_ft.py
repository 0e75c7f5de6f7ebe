"""Factor transfer: factors against the formula, and the paraphraser that is trained before them, in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import STUDENT_MAPS, TEACHER_MAPS, build_loss, drawn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.ft import FT, Paraphraser, factor_map, ft_loss, load_paraphrasers

LAYERS = (("a", "b"),)


@pytest.mark.parametrize(("own", "other"), [(4, 4), (4, 2), (2, 4)])
def test_values_are_those_of_the_reference_code(own, other):
    student, teacher = drawn(3, 5, own, own, seed=1), drawn(3, 5, other, other, seed=2)
    smaller = min(own, other)
    rows = [F.normalize(F.adaptive_avg_pool2d(maps, smaller).pow(2).mean(1).view(3, -1)) for maps in (student, teacher)]
    assert ft_loss(student, teacher).mean().item() == pytest.approx((rows[0] - rows[1]).abs().mean().item(), rel=1e-12)


def test_only_the_translator_trains():
    module, inputs = build_loss(FT(layers=LAYERS, rate=0.25), {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})
    pair = module.pairs[0]
    losses = module(inputs)
    expected = ft_loss(pair.translator(STUDENT_MAPS), pair.paraphraser.encoder(TEACHER_MAPS))
    torch.testing.assert_close(losses, expected)
    assert pair.paraphraser.encoder(TEACHER_MAPS).shape == (8, 8, 8, 8)
    losses.mean().backward()
    assert all(one.grad is not None for one in pair.translator.parameters())
    assert all(one.grad is None for one in pair.paraphraser.parameters())


def test_the_paraphraser_learns_to_rebuild_the_map():
    config = FT(layers=LAYERS).paraphrase()
    module, inputs = build_loss(config, {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})
    pair = module.pairs[0]
    rebuilt = pair.decoder(pair.encoder(TEACHER_MAPS))
    torch.testing.assert_close(module(inputs), (rebuilt - TEACHER_MAPS).square().mean((1, 2, 3)))
    optimizer, first = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), module(inputs).mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        module(inputs).mean().backward()
        optimizer.step()
    assert module(inputs).mean().item() < 0.8 * first


def test_paraphrasers_are_loaded_from_their_stage():
    config = FT(layers=(("a", "b"), ("a", "b")))
    module, _ = build_loss(config, {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})
    stage, _ = build_loss(config.paraphrase(), {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})
    torch.manual_seed(5)
    stage.pairs[1].load_state_dict(Paraphraser(32, 16).double().state_dict())
    load_paraphrasers(module, {f"losses.ft_paraphraser_0.loss.{key}": one for key, one in stage.state_dict().items()})
    for pair, trained in zip(module.pairs, stage.pairs, strict=True):
        assert all(torch.equal(one, trained.state_dict()[key]) for key, one in pair.paraphraser.state_dict().items())
        assert not any(one.requires_grad for one in pair.paraphraser.parameters())


def test_defaults_match_the_reference_code():
    config = FT(layers=LAYERS)
    assert (config.weight, config.rate, config.stage_epochs, config.stage_lr) == (200, 0.5, 30, 0.01)


def test_vectors_and_empty_factors_are_refused():
    with pytest.raises(RecipeError, match="choose layers with maps"):
        build_loss(FT(layers=LAYERS), {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS[:, :, 0, 0]})
    with pytest.raises(RecipeError, match="a rate above 0.03125"):
        build_loss(FT(layers=LAYERS, rate=0.01), {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})


def test_zero_factors_have_finite_gradients():
    zeros = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = ft_loss(zeros, torch.zeros(2, 3, 2, 2)).sum() + ft_loss(zeros, torch.ones(2, 3, 2, 2)).sum()
    loss.backward()
    assert zeros.grad.isfinite().all()
    half = ft_loss((100 * drawn(2, 3, 2, 2, seed=3)).half(), torch.ones(2, 3, 2, 2).half())
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert factor_map(zeros).shape == (2, 4)
