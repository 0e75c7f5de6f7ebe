"""ReviewKD: the reference code's loss at several scales, and the fusion from deep to shallow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import DATASET, STUDENT_HINTS, TEACHER_HINTS, build_loss, drawn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.review_kd import ReviewKD, hcl_loss
from kdpipe.stages.losses.schedules import TrainProgress
from kdpipe.stages.targets.feature_spec import FeatureSpec

LAYERS = (("a", "A"), ("b", "B"), ("c", "C"))
STUDENT = {"a": drawn(4, 4, 8, 8, seed=1), "b": drawn(4, 6, 4, 4, seed=2), "c": drawn(4, 10, seed=3)}
TEACHER = {"A": drawn(4, 5, 8, 8, seed=4), "B": drawn(4, 7, 8, 8, seed=5), "C": drawn(4, 9, seed=6)}


def build(config, student=STUDENT, teacher=TEACHER, **options):
    return build_loss(config, student, teacher, **options)


def config_of(**keys):
    return ReviewKD(loss="review_kd", **({"layers": LAYERS} | keys))


def test_hcl_matches_the_reference_code():
    assert hcl_loss(STUDENT_HINTS, TEACHER_HINTS).mean().item() == pytest.approx(1.192819862, rel=1e-9)


def test_hcl_leaves_out_the_scales_that_a_small_map_lacks():
    student, teacher = STUDENT_HINTS[..., :2, :2], TEACHER_HINTS[..., :2, :2]
    coarse = F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3)))
    expected = (F.mse_loss(student, teacher) + coarse / 2) / 1.5
    assert hcl_loss(student, teacher).mean().item() == pytest.approx(expected.item(), rel=1e-12)
    pixel, other = student[..., :1, :1], teacher[..., :1, :1]
    assert hcl_loss(pixel, other).mean().item() == pytest.approx(F.mse_loss(pixel, other).item(), rel=1e-12)


def test_hcl_gradient_matches_finite_differences():
    student, teacher = drawn(2, 2, 5, 6, seed=1).requires_grad_(), drawn(2, 2, 5, 6, seed=2)
    assert torch.autograd.gradcheck(lambda maps: hcl_loss(maps, teacher).mean(), student)


def test_hcl_of_equal_maps_is_zero_and_flat():
    student = STUDENT_HINTS.clone().requires_grad_()
    loss = hcl_loss(student, STUDENT_HINTS).mean()
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def naive(module, student, teacher):
    """The fusion, written out for three pairs, of which the last is of vectors."""
    a, b, c = module.fusions
    deepest = c.enter(student["c"][:, :, None, None])
    last = c.leave(deepest)
    middle = b.enter(student["b"])
    below = deepest.expand(-1, -1, 4, 4)
    shares = b.attend(torch.cat([middle, below], 1))
    middle = (middle * shares[:, [0]] + below * shares[:, [1]]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    first = a.enter(student["a"])
    shares = a.attend(torch.cat([first, middle], 1))
    first = first * shares[:, [0]] + middle * shares[:, [1]]
    reviewed = (a.leave(first), b.leave(middle), last)
    targets = (teacher["A"], teacher["B"], teacher["C"][:, :, None, None])
    return sum(hcl_loss(own, target).mean() for own, target in zip(reviewed, targets, strict=True))


def test_module_fuses_from_deep_to_shallow_and_sums_pairs():
    module, inputs = build(config_of())
    per_sample = module(inputs)
    assert per_sample.shape == (4,)
    assert per_sample.mean().item() == pytest.approx(naive(module, STUDENT, TEACHER).item(), rel=1e-10)


def test_deepest_stage_has_no_attention_and_all_else_trains():
    module, inputs = build(config_of())
    module(inputs).mean().backward()
    assert module.fusions[-1].attend is None
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_samples_do_not_mix_beyond_the_batch_norms():
    module, inputs = build(config_of())
    module.eval()
    per_sample = module(inputs)
    assert torch.allclose(module(inputs.rows(torch.tensor([3, 0]))), per_sample[[3, 0]])


def test_fused_maps_have_the_deepest_width_up_to_512():
    module, _ = build(config_of())
    assert module.fusions[0].enter[0].out_channels == 10
    module, _ = build(config_of(mid_channels=3))
    assert module.fusions[0].enter[0].out_channels == 3
    wide = config_of(layers=(("c", "C"),)).build({"c": (600,)}, {FeatureSpec("C"): (9,)}, DATASET)
    assert wide.fusions[0].enter[0].out_channels == 512


@pytest.mark.parametrize(
    ("epoch", "warmup_epochs", "share"), [(0, 20, 0.05), (9, 20, 0.5), (19, 20, 1), (100, 20, 1), (0, 0, 1)]
)
def test_loss_grows_over_the_warmup(epoch, warmup_epochs, share):
    module, inputs = build(config_of(warmup_epochs=warmup_epochs), progress=TrainProgress(epoch, 240))
    settled, after = build(config_of())
    assert module(inputs).mean().item() == pytest.approx(share * settled(after).mean().item(), rel=1e-12)


def test_batch_of_one_embedding_is_finite():
    student = {layer: features[:1] for layer, features in STUDENT.items()}
    module, inputs = build(config_of(), student, {layer: features[:1] for layer, features in TEACHER.items()})
    loss = module(inputs).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dead_features_give_finite_values_and_gradients(dtype):
    student = {layer: torch.zeros_like(each, dtype=dtype).requires_grad_() for layer, each in STUDENT.items()}
    module, inputs = build(config_of(), student, dtype=torch.float32)
    loss = module(inputs).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(features.grad).all() for features in student.values())


def test_half_precision_is_subtracted_in_float32():
    student = torch.full((1, 1, 1, 1), 2000.0, dtype=torch.float16)
    assert hcl_loss(student, -student).tolist() == [4000.0**2]


def test_tokens_are_errors_with_both_shapes():
    with pytest.raises(RecipeError, match=r"review_kd cannot join the student's c, .*\[5, 16\].* \[9\]"):
        config_of(layers=(("c", "C"),)).build({"c": (5, 16)}, {FeatureSpec("C"): (9,)}, DATASET)


def test_defaults_match_the_reference_code():
    config = config_of()
    assert (config.weight, config.mid_channels, config.warmup_epochs) == (1, None, 20)
