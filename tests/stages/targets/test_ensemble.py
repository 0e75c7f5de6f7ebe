"""Combined teachers match weights and targets computed by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import LABELS, STUDENT_LOGITS, TEACHER_LOGITS, drawn
from support.tiny_run import CACHE, STUDENT, TEACHER, TRAIN, StopAfter, squares, tiny_context
from torch._subclasses.fake_tensor import FakeTensorMode

from kdpipe.pipeline.steps import cache_teacher, train_student
from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import DISTILLED, student_folder
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.logits.kd import KD, kd_loss
from kdpipe.stages.losses.schedules import FINISHED
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.class_map import ABSENT
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig, check_teachers
from kdpipe.stages.targets.outputs import DenseTargets, TopKTargets
from kdpipe.stages.teacher import untrained_teacher
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.store import StoreError, TopK, encode_topk

LOGITS = [TEACHER_LOGITS, 3 * drawn(8, 10, seed=5), 3 * drawn(8, 10, seed=6)]
TEACHERS = [DenseTargets(logits, {}) for logits in LOGITS]
ALL = [None, None, None]
SOME = torch.tensor([True, False] * 4)
NONE_KNOWN = torch.zeros(8, dtype=torch.bool)
TEMPERATURES = (0.5, 1.0, 4.0)
COMBINE = ("logits", "probabilities")


def together(known=ALL, teachers=TEACHERS, accuracies=None, **config):
    return TeacherEnsemble(TeachersConfig(**config), len(teachers), accuracies)(teachers, known, LABELS)


def target_probabilities(outputs, temperature):
    """Return the target probabilities at a temperature."""
    return (outputs.logits_at(temperature) / temperature).softmax(1)


def by_hand(shares, temperatures, ensemble):
    """The same, in float64: shares float64 [B, M] that add up to 1."""
    soft = [logits / temperature for logits, temperature in zip(LOGITS, temperatures, strict=True)]
    if ensemble == "logits":
        return sum(shares[:, [number]] * values for number, values in enumerate(soft)).softmax(1)
    return sum(shares[:, [number]] * values.softmax(1) for number, values in enumerate(soft))


def rows_of(*shares):
    return (torch.tensor(shares, dtype=torch.float64) / sum(shares)).expand(8, -1)


@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weights", ["equal", (1.0, 2.0, 5.0), (0.3, 0.0, 0.1)])
def test_target_is_the_weighted_mean_of_the_teachers(ensemble, temperature, weights):
    found = target_probabilities(together(ensemble=ensemble, weights=weights), temperature)
    shares = rows_of(1, 1, 1) if weights == "equal" else rows_of(*weights)
    torch.testing.assert_close(found, by_hand(shares, (temperature,) * 3, ensemble), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_teachers_can_have_their_own_temperatures(ensemble, temperature):
    found = target_probabilities(together(ensemble=ensemble, temperatures=(1.0, 2.0, 8.0)), temperature)
    expected = by_hand(rows_of(1, 1, 1), (1.0, 2.0, 8.0), ensemble)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_only_the_proportions_of_weights_count(scale):
    outputs = together(weights=(scale, 3 * scale, 4 * scale))
    torch.testing.assert_close(outputs.weights.double(), rows_of(1, 3, 4), rtol=1e-6, atol=0)


def test_accuracy_weights_are_proportional():
    outputs = together(weights="accuracy", accuracies=(0.9, 0.6, 0.5))
    torch.testing.assert_close(outputs.weights.double(), rows_of(9, 6, 5), rtol=1e-6, atol=0)
    outputs = together(weights="accuracy", accuracies=(0.0, 0.0, 0.0))
    torch.testing.assert_close(outputs.weights.double(), rows_of(1, 1, 1), rtol=1e-6, atol=0)


def test_missing_accuracies_are_an_error():
    with pytest.raises(RecipeError, match=r"student\.teachers\.weights = 'accuracy' needs each teacher's accuracy"):
        together(weights="accuracy")
    assert together(weights="accuracy", teachers=TEACHERS[:1], known=[None]).weights.tolist() == [[1.0]] * 8


@pytest.mark.parametrize("weights", ["equal", (1.0, 1.0, 1.0)])
def test_accuracies_are_used_only_if_configured(weights):
    outputs = together(weights=weights, accuracies=(0.9, 0.6, 0.5))
    torch.testing.assert_close(outputs.weights.double(), rows_of(1, 1, 1), rtol=1e-6, atol=0)


def confidence_by_hand(numbers):
    """CA-MKD's weights, float64 [B, M], of these teachers alone: (1 - e^CE_m / sum e^CE_j) / (M - 1)."""
    shares = np.zeros((8, len(numbers)))
    for row, label in enumerate(LABELS.tolist()):
        probabilities = [float(LOGITS[number][row].softmax(0)[label]) for number in numbers]
        total = sum(1 / p for p in probabilities)  # e^CE is 1 over the probability of the label
        shares[row] = [(1 - 1 / p / total) / (len(numbers) - 1) for p in probabilities]
    return torch.from_numpy(shares)


@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2)])
def test_confidence_weights_match_the_papers_formula(numbers):
    outputs = together(
        teachers=[TEACHERS[number] for number in numbers], known=ALL[: len(numbers)], weights="confidence"
    )
    expected = confidence_by_hand(numbers)
    torch.testing.assert_close(expected.sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(outputs.weights, expected, rtol=1e-9, atol=1e-12)


def test_confidence_compares_only_teachers_with_targets():
    """Rows of samples that a teacher lacks have another sample's values, which must not count."""
    garbage = DenseTargets(torch.where(SOME[:, None], LOGITS[2], torch.full((8, 10), ABSENT)), {})
    garbage.logits[:, 9] = torch.where(SOME, LOGITS[2][:, 9], 50.0)
    outputs = together(teachers=[*TEACHERS[:2], garbage], known=[None, None, SOME], weights="confidence")
    torch.testing.assert_close(outputs.weights[SOME], confidence_by_hand((0, 1, 2))[SOME], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs.weights[~SOME, :2], confidence_by_hand((0, 1))[~SOME], rtol=1e-9, atol=1e-12)
    assert outputs.weights[~SOME, 2].tolist() == [0.0] * 4


def test_sample_known_to_one_teacher_ignores_its_confidence():
    unsure = DenseTargets(F.one_hot((LABELS + 1) % 10, 10) * 500.0, {})
    outputs = together(teachers=[unsure, TEACHERS[1]], known=[None, SOME], weights="confidence")
    assert outputs.weights[~SOME].tolist() == [[1.0, 0.0]] * 4
    assert outputs.weights[SOME, 1].tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("weights", ["equal", (1.0, 2.0, 5.0), "confidence", "learnable"])
def test_teacher_has_no_weight_on_samples_without_targets(ensemble, weights):
    garbage = DenseTargets(torch.where(SOME[:, None], LOGITS[1], drawn(8, 10, seed=9) * 1e4), {})
    found = together(
        teachers=[TEACHERS[0], garbage, TEACHERS[2]], known=[None, SOME, None], **config(ensemble, weights)
    )
    whole = together(**config(ensemble, weights))
    shorter = weights if isinstance(weights, str) else (weights[0], weights[2])
    without = together(teachers=[TEACHERS[0], TEACHERS[2]], known=[None, None], **config(ensemble, shorter))
    for temperature in TEMPERATURES:
        expected = torch.where(
            SOME[:, None], target_probabilities(whole, temperature), target_probabilities(without, temperature)
        )
        torch.testing.assert_close(target_probabilities(found, temperature), expected, rtol=1e-5, atol=1e-9)


def config(ensemble, weights):
    return {"ensemble": ensemble, "weights": weights}


@pytest.mark.parametrize("ensemble", COMBINE)
def test_sample_known_only_to_a_zero_weight_teacher(ensemble):
    outputs = together(teachers=TEACHERS[:2], known=[SOME, None], weights=(1.0, 0.0), ensemble=ensemble)
    expected = torch.where(SOME[:, None], LOGITS[0].softmax(1), LOGITS[1].softmax(1))
    torch.testing.assert_close(target_probabilities(outputs, 1.0), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("weights", ["equal", "confidence", "learnable", (0.0, 1.0, 0.0)])
def test_sample_without_any_target_causes_no_nan(ensemble, weights):
    known = [SOME, SOME, NONE_KNOWN]
    combined = TeacherEnsemble(TeachersConfig(ensemble=ensemble, weights=weights), 3)
    student = STUDENT_LOGITS.clone().requires_grad_()
    losses = distilled(combined, kd())(batch(known, student))
    torch.stack(list(losses.values())).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad.abs().sum(1) > 0).tolist() == SOME.tolist()
    assert all(torch.isfinite(parameter.grad).all() for parameter in combined.parameters())


def kd(**changes):
    return KD(loss="kd", weight=1.0, temperature=2.0, **changes)


def distilled(combined, *losses):
    dataset = DatasetInfo(num_samples=8, num_classes=10)
    return build_distillation(losses, {}, ({}, {}, {}), ensemble=combined, dataset=dataset, seed=0)


def batch(known=ALL, student=STUDENT_LOGITS):
    return DistillationBatch(ModelOutput(student, {}), TEACHERS, known, LABELS, torch.arange(8), FINISHED, {})


def test_losses_of_one_store_combine_with_losses_of_all():
    combined = TeacherEnsemble(TeachersConfig(weights=(1.0, 2.0, 5.0), temperatures=(1.0, 3.0, 9.0)), 3)
    losses = distilled(combined, kd(), kd(store=2), kd(store=1))(batch([None, SOME, None]))
    alone = [kd_loss(STUDENT_LOGITS, logits, 2.0) for logits in LOGITS]
    assert losses["kd_1"].item() == pytest.approx(alone[2].mean().item(), rel=1e-9)  # neither weight nor temperature
    assert losses["kd_2"].item() == pytest.approx(alone[1][SOME].sum().item() / 8, rel=1e-9)
    target = 2 * torch.where(
        SOME[:, None], LOGITS[0] / 8 + LOGITS[1] / 12 + LOGITS[2] * 5 / 72, LOGITS[0] / 6 + LOGITS[2] * 5 / 54
    )
    expected = kd_loss(STUDENT_LOGITS, target, 2.0).mean().item()
    assert losses["kd_0"].item() == pytest.approx(expected, rel=1e-6)


def test_single_teacher_can_have_its_own_temperature():
    combined = TeacherEnsemble(TeachersConfig(temperatures=(8.0,)), 1)
    outputs = DistillationBatch(
        ModelOutput(STUDENT_LOGITS, {}), TEACHERS[:1], [None], LABELS, torch.arange(8), FINISHED, {}
    )
    expected = kd_loss(STUDENT_LOGITS, LOGITS[0] / 4, 2.0).mean().item()
    assert distilled(combined, kd())(outputs)["kd_0"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ensemble", COMBINE)
def test_top_k_teachers_combine_at_their_own_temperatures(ensemble):
    """Between the grid's temperatures only the mass of the rest is approximate; on them it is exact."""
    top_k = TopK(10, 4, (1.0, 2.0, 4.0))
    packed = encode_topk(LOGITS[1].float().numpy(), top_k, "float32")
    arrays = [torch.from_numpy(packed[f"logits/{name}"].astype(kind)) for name, kind in PACKED.items()]
    packed_teacher = TopKTargets(top_k, *arrays, {})
    outputs = together(
        teachers=[TEACHERS[0], packed_teacher], known=[None, None], temperatures=(1.0, 4.0), ensemble=ensemble
    )
    soft = (LOGITS[1] / 4).softmax(1)
    kept = soft >= soft.sort(1).values[:, [-4]]
    rest = torch.where(kept, 0, soft).sum(1, keepdim=True) / 6
    spread = torch.where(kept, soft, rest)
    own = LOGITS[0].softmax(1)
    expected = (own + spread) / 2 if ensemble == "probabilities" else ((own.log() + spread.log()) / 2).softmax(1)
    torch.testing.assert_close(target_probabilities(outputs, 7.0), expected, rtol=5e-3, atol=1e-5)
    with pytest.raises(StoreError, match="temperature"):
        together(teachers=[TEACHERS[0], packed_teacher], known=[None, None]).logits_at(7.0)


PACKED = {"values": "float32", "indices": "int64", "tail": "float32"}


@pytest.mark.parametrize("ensemble", COMBINE)
def test_learnable_weights_get_the_true_gradient(ensemble):
    combined = TeacherEnsemble(TeachersConfig(weights="learnable", ensemble=ensemble), 3).double()
    assert [name for name, _ in combined.named_parameters()] == ["scores"]

    def loss(scores, student):
        outputs = torch.func.functional_call(combined, {"scores": scores}, (TEACHERS, [None, SOME, None], LABELS))
        return kd_loss(student, outputs.logits_at(2.0), 2.0).mean()

    scores = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (scores, STUDENT_LOGITS.clone().requires_grad_()))


@pytest.mark.parametrize("weights", ["equal", (1.0, 2.0, 3.0), "confidence"])
def test_fixed_weights_have_no_parameters_and_no_gradient(weights):
    combined = TeacherEnsemble(TeachersConfig(weights=weights), 3)
    assert list(combined.parameters()) == []
    assert not combined(TEACHERS, ALL, LABELS).logits_at(2.0).requires_grad
    assert list(TeacherEnsemble(TeachersConfig(weights="learnable"), 1).parameters()) == []


@pytest.mark.parametrize(
    ("ensemble", "weights"), list(itertools.product(COMBINE, ["equal", "confidence", (1.0, 2.0, 3.0)]))
)
def test_rows_of_combined_outputs(ensemble, weights):
    outputs = together([None, SOME, None], ensemble=ensemble, weights=weights)
    index = torch.tensor([6, 1, 1])
    assert torch.equal(outputs.rows(index).logits_at(3.0), outputs.logits_at(3.0)[index])


@pytest.mark.parametrize("weights", ["equal", "confidence"])
def test_masks_on_the_cpu_work_with_logits_on_the_gpu(weights):
    """No GPU is needed: fake tensors have a device, and raise an error if devices are mixed."""
    with FakeTensorMode():
        teachers = [DenseTargets(torch.empty(8, 10, device="cuda"), {}) for _ in range(2)]
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        known = [torch.empty(8, dtype=torch.bool), None]
        outputs = TeacherEnsemble(TeachersConfig(weights=weights), 2)(teachers, known, labels)
        assert outputs.logits_at(2.0).device.type == "cuda"
        assert outputs.rows(torch.empty(3, dtype=torch.int64, device="cuda")).logits_at(2.0).shape == (3, 10)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": (1.0, 1.0)}, r"student\.teachers\.weights has 2 entries for 3 stores: give one per store"),
        ({"weights": ()}, r"student\.teachers\.weights has 0 entries for 3 stores"),
        ({"weights": (0.0, 0.0, 0.0)}, r"student\.teachers\.weights are all 0: set at least one above 0"),
        ({"temperatures": (1.0,) * 4}, r"student\.teachers\.temperatures has 4 entries for 3 stores"),
        ({"classes": ("names",)}, r"student\.teachers\.classes has 1 entries for 3 stores"),
    ],
)
def test_lists_of_wrong_length_are_errors(settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        check_teachers(TeachersConfig(**settings), 3)


def test_lists_of_the_right_length_are_accepted():
    check_teachers(TeachersConfig(), 3)
    classes = ("same", "names", {"tabby": "cat"})
    check_teachers(TeachersConfig(weights=(0.0, 0.0, 1.0), temperatures=(1.0, 2.0, 3.0), classes=classes), 3)


@pytest.mark.parametrize("settings", [{"weights": (1.0, -1.0)}, {"weights": (1.0, float("nan"))}, {"weights": "best"}])
def test_invalid_weights_are_errors(settings):
    with pytest.raises(RecipeError, match="weights"):
        TeachersConfig(**settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stores of untrained teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    context = tiny_context(folder, train_set=squares(64, 0), test_set=squares(20, 1, "test"))
    for seed in (0, 1):
        cache_teacher(CACHE, folder / f"{seed}.zarr", untrained_teacher(TEACHER, seed, context), [], context)
    return folder


def stores(run):
    return [run / "0.zarr", run / "1.zarr"]


def student_of(**teachers):
    train = dataclasses.replace(TRAIN, checkpoint_every_s=3600)
    return dataclasses.replace(STUDENT, train=train, teachers=TeachersConfig(**teachers))


def train_in(folder, stores_dir, student, monitor=None):
    context = tiny_context(folder, monitor, train_set=squares(64, 0), test_set=squares(20, 1, "test"))
    spec = open_distillation(stores(stores_dir), [kd()], student, {}, context)
    run = StudentRun(student_folder(folder, DISTILLED, 0), "student", with_onnx=False)
    return train_student(student, 0, spec, context, student_run=run)


def test_learnable_weights_train_resume_and_stay_out_of_student(run, tmp_path):
    student = student_of(weights="learnable")
    with pytest.raises(StoppedEarly):
        train_in(tmp_path / "stopped", run, student, RunMonitor(should_stop=StopAfter(3)))
    folder = student_folder(tmp_path / "stopped", DISTILLED, 0)
    tensors, _ = load_tensors(folder.checkpoint)
    scores = tensors["modules/distillation.ensemble.scores"]
    assert scores.shape == (2,)
    assert scores[0] != scores[1]
    assert any(key.startswith("optimizer/") and tensor.shape == (2,) for key, tensor in tensors.items())
    train_in(tmp_path / "stopped", run, student)
    train_in(tmp_path / "whole", run, student)
    assert folder.model.read_bytes() == student_folder(tmp_path / "whole", DISTILLED, 0).model.read_bytes()
    assert not [key for key in load_tensors(folder.model)[0] if "scores" in key]


def test_wrong_list_is_an_error_before_training(run, tmp_path):
    for settings in ({"weights": (1.0,)}, {"temperatures": (1.0, 2.0, 3.0)}, {"classes": ("same",)}):
        with pytest.raises(RecipeError, match="entr.* for 2 stores"):
            train_in(tmp_path, run, student_of(**settings))
    with pytest.raises(RecipeError, match="student.teachers.weights = 'accuracy' needs"):
        train_in(tmp_path, run, student_of(weights="accuracy"))


@pytest.mark.parametrize("ensemble", COMBINE)
def test_weights_are_learned_from_the_labels_alone(ensemble):
    """A constant teacher is the easiest to imitate, and must not get the weight for it."""
    labels = torch.arange(40) % 4
    good = 4 * torch.eye(4)[labels] + drawn(40, 4, seed=1).float()
    student = torch.zeros(40, 4, requires_grad=True)
    combined = TeacherEnsemble(TeachersConfig(ensemble=ensemble, weights="learnable"), 2)
    losses = build_distillation(
        [kd()], {}, ({}, {}), ensemble=combined, dataset=DatasetInfo(num_samples=40, num_classes=4), seed=0
    )
    teachers = [DenseTargets(torch.zeros(40, 4), {}), DenseTargets(good, {})]
    optimizer = torch.optim.SGD([student, *losses.parameters()], lr=1.0)
    for _ in range(200):
        found = losses(
            DistillationBatch(ModelOutput(student, {}), teachers, [None, None], labels, labels, FINISHED, {})
        )
        optimizer.zero_grad()
        found["kd_0"].backward(retain_graph=True)
        assert combined.scores.grad is None
        found["teacher_weights"].backward()
        optimizer.step()
    assert combined.scores.softmax(0)[0] < 0.15
    assert (student.argmax(1) == labels).float().mean() >= (good.argmax(1) == labels).float().mean()


def test_mixed_samples_teach_the_weights_both_labels():
    combined = TeacherEnsemble(TeachersConfig(weights="learnable"), 3)
    partners, share = (LABELS + 1) % 10, torch.full((8,), 0.75)
    mixed = dataclasses.replace(batch(), hard=HardLabels(LABELS, partners, share))
    expected = mixed.hard.losses(sum(LOGITS) / 3).mean()
    assert distilled(combined, kd())(mixed)["teacher_weights"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_that_no_loss_uses_are_not_learned():
    combined = TeacherEnsemble(TeachersConfig(weights="learnable"), 3)
    assert list(distilled(combined, kd(store=1))(batch())) == ["kd_0"]


def test_confidence_counts_teachers_equally_without_a_label():
    labels = torch.where(torch.arange(8) < 4, LABELS, -1)
    found = TeacherEnsemble(TeachersConfig(weights="confidence"), 3)(TEACHERS, ALL, labels).weights
    assert torch.equal(found[:4], together(weights="confidence").weights[:4])
    assert torch.allclose(found[4:], torch.full((4, 3), 1 / 3, dtype=found.dtype))
