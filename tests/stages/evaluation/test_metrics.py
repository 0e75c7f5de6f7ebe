"""Tests of in-depth evaluation against hand-computed values and torchmetrics."""

import json
import math

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import STUDENT, tiny_context
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.errors import DataError
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.evaluate import Evaluation, evaluate, of_teacher
from kdpipe.stages.evaluation.metrics import evaluate_in_depth
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job_dir import JobDir


class TableModel(nn.Module):
    """A model that maps an image to row 256 * first pixel + second pixel of a table [N, C]."""

    def __init__(self, table):
        super().__init__()
        self.table = table.to(DEVICE)

    def forward(self, images):
        assert not self.training
        high, low = (255 * images).round().long().flatten(1).T
        return self.table[256 * high + low]


def report_of(logits, labels, teacher=None, num_classes=None):
    """Return the report of a model that gives `logits` on a test set with `labels`."""
    return evaluate_in_depth(*model_and_test(logits, labels, teacher, num_classes), DEVICE)


def model_and_test(logits, labels, teacher=None, num_classes=None):
    ids = torch.arange(len(labels))
    images = torch.stack([ids // 256, ids % 256], 1).to(torch.uint8).view(-1, 1, 1, 2)
    names = tuple(f"class {number}" for number in range(num_classes or logits.shape[1]))
    image_set = ImageSet("numbers", "test", images, torch.tensor(labels), ids, names)
    get_logits = None if teacher is None else teacher.__getitem__
    return TableModel(logits), Evaluation(ImageLoader(image_set, DEVICE), Normalization((0.0,), (1.0,)), get_logits)


def test_metrics_match_hand_computed_values():
    predicted = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    teacher = torch.tensor([[0.5, 0.4], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9]])
    teacher = teacher / teacher.sum(1, keepdim=True)
    found = report_of(predicted.log(), [0, 1, 1, 1], teacher.log())
    assert found.top1 == 0.75
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4)
    # Half of the samples at 0.9, one of two right; half at 0.6, both right.
    assert found.ece == pytest.approx((abs(0.5 - 0.9) + abs(1 - 0.6)) / 2)
    assert found.agreement == 0.75
    divergence = sum(
        p * math.log(p / q) for t, s in zip(teacher, predicted, strict=True) for p, q in zip(t, s, strict=True)
    )
    assert found.teacher_kl == pytest.approx(float(divergence) / 4, rel=1e-5)
    assert [(one.accuracy, one.num_samples) for one in found.per_class] == [(1.0, 1), (2 / 3, 3)]


def test_bins_match_counts_and_calibration_error():
    logits, labels, _ = random_case()
    found = report_of(logits, labels.tolist())
    confidence, predicted = logits.double().softmax(1).max(1)
    counted = [[] for _ in range(15)]
    for sure, right in zip(confidence.tolist(), (predicted == labels).tolist(), strict=True):
        counted[min(int(15 * sure), 14)].append((sure, right))
    assert [one.num_samples for one in found.bins] == [len(samples) for samples in counted]
    assert any(not samples for samples in counted)
    for one, samples in zip(found.bins, counted, strict=True):
        expected = [pytest.approx(sum(column) / len(samples)) for column in zip(*samples, strict=True)] or [None, None]
        assert [one.confidence, one.accuracy] == expected
    gaps = (one.num_samples * abs(one.accuracy - one.confidence) for one in found.bins if one.num_samples)
    assert found.ece == pytest.approx(sum(gaps) / 700)


def test_confusions_are_counts_of_wrong_predictions(monkeypatch):
    predicted = torch.eye(3)[[0, 1, 1, 2, 0, 0]]
    labels = [0, 0, 0, 1, 1, 2]
    assert report_of(predicted, labels).confusions == [[0, 1, 2], [1, 0, 1], [1, 2, 1], [2, 0, 1]]
    monkeypatch.setattr("kdpipe.stages.evaluation.metrics.MAX_CONFUSIONS", 2)
    assert report_of(predicted, labels).confusions == [[0, 1, 2], [1, 0, 1]]  # the most frequent, then the first


def test_top5_accuracy_needs_six_classes():
    falling = -torch.arange(6.0).repeat(3, 1)
    assert report_of(falling, [0, 4, 5]).top5 == 2 / 3
    assert report_of(falling[:, :5], [0, 4, 3]).top5 is None


def test_class_without_samples_has_no_accuracy():
    found = report_of(torch.eye(3)[[0, 2]], [0, 0])
    assert [(one.accuracy, one.num_samples) for one in found.per_class] == [(0.5, 2), (None, 0), (None, 0)]


def test_confidence_of_one_is_in_the_last_bin():
    """0.97 and right, 1 and wrong: apart they would err by (0.03 + 1) / 2, in one bin they err by less."""
    predicted = torch.tensor([[math.log(0.97), math.log(0.03)], [200.0, 0.0]])
    assert report_of(predicted, [0, 1]).ece == pytest.approx(abs(0.5 - 1.97 / 2))


def random_case(num_samples=700, num_classes=12):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator)
    teacher = 2 * torch.randn(num_samples, num_classes, generator=generator)
    return logits, torch.randint(num_classes - 1, (num_samples,), generator=generator), teacher


def test_metrics_over_batches_equal_those_of_the_whole():
    """700 samples are two batches; the last class has none."""
    logits, labels, teacher = random_case()
    found = report_of(logits, labels.tolist(), teacher)
    assert found.top5 == pytest.approx(float(multiclass_accuracy(logits, labels, 12, top_k=5, average="micro")))
    assert found.ece == pytest.approx(float(multiclass_calibration_error(logits, labels, 12, 15)), rel=1e-4)
    by_class = multiclass_accuracy(logits, labels, 12, average=None).tolist()
    assert [one.accuracy for one in found.per_class[:-1]] == pytest.approx(by_class[:-1])
    assert found.per_class[-1].accuracy is None
    divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    assert found.teacher_kl == pytest.approx(float(divergence), rel=1e-5)
    assert found.agreement == pytest.approx(float((logits.argmax(1) == teacher.argmax(1)).float().mean()))


def test_samples_without_teacher_logits_are_not_compared():
    logits, labels, teacher = random_case(num_samples=40)
    some = teacher.clone()
    some[::3] = float("nan")
    known = [row for row in range(40) if row % 3]
    found = report_of(logits, labels.tolist(), some)
    without = report_of(logits[known], labels[known].tolist(), teacher[known])
    assert (found.agreement, found.teacher_kl) == (without.agreement, pytest.approx(without.teacher_kl))
    assert found.top1 == report_of(logits, labels.tolist()).top1


@pytest.mark.parametrize("teacher", [None, torch.full((40, 12), float("nan"))])
def test_without_teacher_there_is_no_agreement(teacher):
    logits, labels, _ = random_case(num_samples=40)
    found = report_of(logits, labels.tolist(), teacher)
    assert found.agreement is None
    assert found.teacher_kl is None


def test_kl_of_a_network_to_itself_is_zero():
    """Not below zero either: of some of these sixteen networks, rounding alone makes the sum negative."""
    for logits in torch.randn(16, 1, 3, generator=torch.Generator().manual_seed(0)):
        found = report_of(logits, [0], logits)
        assert found.agreement == 1.0
        assert 0 <= found.teacher_kl < 1e-12


def test_metrics_of_nan_logits_are_nan():
    logits, labels, teacher = random_case(num_samples=40)
    found = report_of(logits * float("nan"), labels.tolist(), teacher)
    assert all(math.isnan(figure) for figure in (found.loss, found.ece, found.teacher_kl))
    assert found.bins is None


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training):
    model, test = model_and_test(torch.eye(3), [0, 1, 2])
    evaluate_in_depth(model.train(training), test, DEVICE)
    assert model.training is training


def test_report_is_reproducible_and_equals_evaluate():
    logits, labels, teacher = random_case()
    model, test = model_and_test(logits, labels.tolist(), teacher)
    one, other, measured = (
        evaluate_in_depth(model, test, DEVICE),
        evaluate_in_depth(model, test, DEVICE),
        evaluate(model, test, DEVICE),
    )
    assert one == other
    assert (one.top1, one.loss) == (measured.value, measured.loss)


def test_finished_job_saves_the_report(tmp_path):
    context, folder = tiny_context(tmp_path), JobDir(tmp_path)
    normalize = Normalization((0.4,), (0.2,))
    model = context.build_model(STUDENT.model, 0).to(DEVICE)
    network = ModelBundle(model, context.architecture(STUDENT.model), normalize)
    result = finalize(folder, network, [], context.evaluation(network.normalize))
    assert folder.result() == json.loads(json.dumps(result)) == result
    assert result["accuracy"] == result["best_accuracy"] == result["examined"]["top1"]
    assert result["examined"] == evaluate_in_depth(network.model, context.evaluation(normalize), DEVICE).to_json()
    assert sum(one["num_samples"] for one in result["examined"]["per_class"]) == context.test_set.num_samples


def test_report_says_which_images_are_correct():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = report_of(logits, [0, 1, 1, 0])
    outcome = outcome_of({"accuracy": found.top1, "examined": found.to_json()})
    assert outcome.correct.tolist() == [True, False, True, True]


def test_without_labels_the_teachers_classes_stand_for_them():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    teacher = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [math.nan, math.nan]])
    model, test = model_and_test(logits, [-1] * 4, teacher)
    found, measured = evaluate_in_depth(model, test, DEVICE), evaluate(model, test, DEVICE)
    assert found.top1 == found.agreement == measured.value == 2 / 3
    assert measured.to_json() == {"metric": "agreement", "agreement": 2 / 3, "cross_entropy": found.loss}
    assert (found.ece, found.bins, found.per_class, found.confusions) == (None, None, [], [])
    outcome = outcome_of({**measured.to_json(), "examined": found.to_json()})
    assert outcome.correct.tolist() == [True, False, True]
    with pytest.raises(DataError, match="the test images of numbers have no labels, and there are no outputs"):
        report_of(logits, [-1] * 4)
    itself = of_teacher(model_and_test(logits, [-1] * 4)[1], model)
    assert evaluate(model, itself, DEVICE).value == 1


def test_accuracy_is_that_of_the_labeled_images():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    found, whole = report_of(logits, [0, -1, 0, -1], logits), report_of(logits[[0, 2]], [0, 0])
    assert (found.top1, found.loss, found.num_samples) == (0.5, whole.loss, 2)
    assert (found.bins, found.per_class, found.confusions) == (whole.bins, whole.per_class, whole.confusions)
    assert found.agreement == 1  # on all images
