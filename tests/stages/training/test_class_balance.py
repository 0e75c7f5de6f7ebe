"""Class weights are those of torch; balanced sampling shows all classes equally often."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import drawn
from support.tiny_training import equal_weights, tiny_job, tiny_network, trained, trained_in_pieces

from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.data.loader.sampling import balanced_order
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.training.class_balance import class_weights, with_class_balance
from kdpipe.stages.training.optim import TrainConfig

LABELS = torch.tensor([0] * 60 + [1] * 30 + [3] * 10)
BALANCED = TrainConfig(class_weights="balanced")


def test_balanced_weights_are_inverse_sizes_of_mean_one():
    weights = class_weights(BALANCED, LABELS, 4)
    assert weights[[0, 1, 3]].tolist() == pytest.approx([100 / (3 * size) for size in (60, 30, 10)])  # scikit-learn's
    assert weights[LABELS].mean().item() == pytest.approx(1)
    assert class_weights(TrainConfig(), LABELS, 4) is None


def test_given_weights_count_as_in_torch():
    """Over all samples the mean is that of torch, which divides by the sum of the weights."""
    given, logits = (0.5, 2.0, 7.0, 3.0), drawn(100, 4, seed=1).float()
    weights = class_weights(TrainConfig(class_weights=given), LABELS, 4)
    found = HardLabels(LABELS).losses(logits, 0.0, weights).mean()
    assert found.item() == pytest.approx(F.cross_entropy(logits, LABELS, torch.tensor(given)).item(), rel=1e-6)


def test_mixed_samples_have_the_weight_of_each_label():
    logits, weights, share = drawn(4, 4, seed=2).float(), torch.tensor([1.0, 2, 3, 4]), torch.full((4,), 0.25)
    labels, partners = torch.arange(4), torch.arange(4).flip(0)
    log_p = logits.log_softmax(1)
    own, other = (-weights[one] * log_p.gather(1, one[:, None])[:, 0] for one in (labels, partners))
    found = HardLabels(labels, partners, share).losses(logits, 0.0, weights)
    torch.testing.assert_close(found, 0.25 * own + 0.75 * other)


@pytest.mark.parametrize(
    ("given", "fault"), [((1.0, 2.0), "2 numbers for 4 classes"), ((0.0, 0, 1, 0), "are 0 for all")]
)
def test_weights_that_fit_no_class_are_refused(given, fault):
    with pytest.raises(RecipeError, match=fault):
        class_weights(TrainConfig(class_weights=given), LABELS, 4)


@pytest.mark.parametrize("epoch", [0, 1])
def test_balanced_epochs_have_all_classes_equally_often(epoch):
    order = balanced_order(0, epoch, LABELS, len(LABELS))
    assert torch.equal(order, balanced_order(0, epoch, LABELS, len(LABELS)))
    assert not torch.equal(order, balanced_order(0, epoch + 1, LABELS, len(LABELS)))
    counts = torch.bincount(LABELS[order], minlength=4)
    assert sorted(counts.tolist()) == [0, 33, 33, 34]
    times = torch.bincount(order, minlength=100)
    assert times[:60].max() == 1  # of the largest class none is repeated
    assert times[60:90].min() >= 1
    assert times[90:].min() >= 3
    assert times[90:].max() <= 4


def test_more_classes_than_samples_of_an_epoch_are_drawn_as_well():
    assert balanced_order(0, 0, torch.arange(5), 5).sort().values.tolist() == list(range(5))


def test_a_balanced_job_resumes_bit_for_bit(tmp_path):
    settings = {"class_weights": (1.0, 2.0, 3.0, 4.0), "sampler": "balanced"}
    whole, history = trained(tmp_path / "whole", **settings)
    pieces, other = trained_in_pieces(tmp_path / "pieces", **settings)
    assert equal_weights(whole, pieces)
    assert history == other
    assert not equal_weights(whole, trained(tmp_path / "plain")[0])


def test_memories_of_samples_refuse_repeated_ones(tmp_path):
    losses = build_distillation(
        [CRD(layers=(("a", "b"),), dim=4)],
        {"a": (3,)},
        ({FeatureSpec("b", "pooled"): (3,)},),
        ensemble=TeacherEnsemble(TeachersConfig(), 1),
        dataset=DatasetInfo(100, 4),
        seed=0,
    )
    job = tiny_job(tmp_path, tiny_network(), sampler="balanced")
    with pytest.raises(RecipeError, match="repeats samples, of which crd_0 keeps one embedding"):
        with_class_balance(replace(job, task=replace(job.task, distillation=losses)))
