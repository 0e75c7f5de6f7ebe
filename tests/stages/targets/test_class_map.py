"""Teachers with other classes: mapped by name or table, at any temperature."""

import dataclasses

import pytest
import torch
from support.device import DEVICE
from support.loss_inputs import drawn
from support.tiny_run import CACHE, OPERATIONS, STUDENT, TEACHER, VIEWS, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD, LogitMSE, kd_loss
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import FINISHED
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.class_map import ClassMap, read_class_map
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.outputs import DenseTargets, TransformedTargets
from kdpipe.stages.teacher import untrained_teacher
from kdpipe.store import FingerprintMismatch, StoreError, open_store

OURS = squares(60, 0)
"""The student's classes are a, b, c, d."""

FINE_NAMES = ("d", "tabby", "b", "zebra", "persian", "c")
"""The teacher has two kinds of `a`; the student has no zebras."""

FINE_TABLE = {"tabby": "a", "persian": "a", "b": "b", "c": "c", "d": "d"}
FINE = ClassMap(torch.tensor([3, 0, 1, -1, 0, 2]).numpy(), 4)
PART = ClassMap(torch.tensor([1, -1, 0]).numpy(), 4)
"""The teacher has b, another class, and a."""

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
TEST = squares(20, 1, "test")


def fine(images: ImageSet) -> ImageSet:
    """Return the same images with a finer teacher's classes."""
    kinds = torch.tensor([1, 2, 5, 0])[images.labels]
    kinds[(images.labels == 0) & (images.sample_ids % 2 == 0)] = 4
    return dataclasses.replace(images, labels=kinds, class_names=FINE_NAMES)


def with_unlabeled(images: ImageSet) -> ImageSet:
    """Return the images without the labels of every third sample."""
    return dataclasses.replace(images, labels=images.labels.masked_fill(images.sample_ids % 3 == 0, -1))


def of_classes(images: ImageSet, labels: list[int], names: tuple[str, ...]) -> ImageSet:
    """Return the images of some classes, numbered by their index in `labels`; `names` may have more."""
    own = images.take(torch.isin(images.labels, torch.tensor(labels)).nonzero()[:, 0])
    numbers = torch.full((4,), -1)
    numbers[labels] = torch.arange(len(labels))
    return dataclasses.replace(own, labels=numbers[own.labels], class_names=names)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stores of untrained teachers of finer classes, of a and b, of b and c, and of the student's own, and others."""
    folder = tmp_path_factory.mktemp("class_map")
    seen = {
        "fine": fine(OURS),
        "unlabeled": with_unlabeled(fine(OURS)),
        "ab": of_classes(OURS, [1, 0], ("b", "a", "zebra")),
        "bc": of_classes(OURS, [1, 2], ("b", "c")),
        "same": OURS,
        "twins": dataclasses.replace(OURS, class_names=("a", "b", "crane", "crane")),
    }
    for seed, (name, images) in enumerate(seen.items()):
        context = tiny_context(folder, train_set=images, test_set=TEST)
        cache_teacher(CACHE, folder / f"{name}.zarr", untrained_teacher(TEACHER, seed, context), [], context)
    return folder


def opened(run, name):
    return open_store(run / f"{name}.zarr")


def task_of(run, names, classes, losses=None, *, missing="error", images=OURS, **teachers):
    context = tiny_context(run, train_set=images, test_set=TEST)
    config = TeachersConfig(classes=classes, **teachers)
    student = dataclasses.replace(STUDENT, teachers=config, missing_targets=missing)
    places = [run / f"{name}.zarr" for name in names]
    spec = open_distillation(places, losses or [kd()], student, {}, context)
    return build_task(build_student(student, 0, context), spec, 0, context)


def kd(**changes):
    return KD(loss="kd", weight=1.0, temperature=4.0, **changes)


def whole_batch(task):
    """All samples, and the ids and labels in their order."""
    images, order = task.loader.dataset, task.order(3, 0)
    batch = next(task.stream(3, images.num_samples, epoch=0, step=0, epochs=1))
    assert torch.equal(batch.hard.labels.cpu(), images.labels[order])
    return batch, images.sample_ids[order], images.labels[order]


def losses_of(task, logits, batch):
    """Return a task's losses for a student's logits."""
    return task.losses(ModelOutput(logits.to(DEVICE), {}), batch)


def stored(run, name, ids):
    return torch.from_numpy(opened(run, name).gather("logits", 0, ids.numpy())).float()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_merged_classes_add_up_at_any_temperature(temperature):
    logits = 5 * drawn(8, 6, seed=1)
    given = (logits[:, [0, 1, 2, 4, 5]] / temperature).softmax(1)  # zebras are left out
    expected = torch.stack([given[:, 1] + given[:, 3], given[:, 2], given[:, 4], given[:, 0]], 1)
    found = (FINE.map_logits(logits, temperature) / temperature).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    mapped = TransformedTargets(DenseTargets(logits, {}), FINE.map_logits)
    assert torch.equal(mapped.logits_at(temperature), FINE.map_logits(logits, temperature))
    some = torch.tensor([3, 3, 0])
    assert torch.equal(mapped.rows(some).logits_at(temperature), mapped.logits_at(temperature)[some])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_classes_that_the_teacher_lacks_have_no_probability(temperature):
    logits = 5 * drawn(8, 3, seed=1)
    expected = torch.zeros(8, 4, dtype=torch.float64)
    expected[:, [1, 0]] = (logits[:, [0, 2]] / temperature).softmax(1)
    found = (PART.map_logits(logits, temperature) / temperature).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-100)
    assert (FINE.has_all_classes, PART.has_all_classes) == (True, False)


LOSSES = [
    kd(),
    DKD(loss="dkd", warmup_epochs=0),
    DIST(loss="dist"),
    NKD(loss="nkd", temperature=4.0),
    MLLD(loss="mlld"),
    kd(samples=SampleSelection(filter="hard", weighting="entropy")),
    kd(samples=SampleSelection(weighting="correctness")),
]
NAMED = [f"{number}-{loss.loss}" for number, loss in enumerate(LOSSES)]


@pytest.mark.parametrize("ensemble", ["alone", "logits", "probabilities"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMED)
def test_losses_are_finite_if_a_teacher_lacks_a_class(loss, scale, ensemble):
    """Teachers have only a and b, or a, of four classes; the student may be very confident in another one."""
    single = ClassMap(torch.tensor([0, -1, -1]).numpy(), 4)
    teachers = [
        TransformedTargets(DenseTargets(scale * drawn(8, 3, seed=seed).float(), {}), class_map.map_logits)
        for seed, class_map in ((1, PART), (2, single))
    ][: 1 if ensemble == "alone" else 2]
    config = TeachersConfig(ensemble="probabilities" if ensemble == "alone" else ensemble)
    labels = torch.tensor([0, 1] * 4)
    known = [None, labels == 0][: len(teachers)]
    student = (scale * drawn(8, 4, seed=3).float()).requires_grad_()
    distillation = build_distillation(
        [loss],
        {},
        [{}] * len(teachers),
        ensemble=TeacherEnsemble(config, len(teachers)),
        dataset=DatasetInfo(num_samples=8, num_classes=4),
        seed=0,
    )
    outputs = DistillationBatch(ModelOutput(student, {}), teachers, known, labels, torch.arange(8), FINISHED, {})
    (found,) = distillation(outputs).values()
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0 or scale > 1  # a student that is quite sure may have no gradient left


def test_gradient_comes_only_from_the_teachers_classes():
    """The gradient of KD is p - q: classes without teacher probability are pushed down by the student's."""
    student = drawn(8, 4, seed=3).requires_grad_()
    target = PART.map_logits(drawn(8, 3, seed=1), 4.0)
    kd_loss(student, target, 4.0).sum().backward()
    own = (student.detach() / 4).softmax(1)
    torch.testing.assert_close(student.grad[:, 2:], 4 * own[:, 2:], rtol=1e-9, atol=0)


def test_classes_are_matched_by_name(run):
    found = read_class_map(opened(run, "fine"), OURS, "names")
    assert found.student_class.tolist() == [3, -1, 1, -1, -1, 2]
    assert (found.num_classes, found.has_all_classes) == (4, False)
    assert read_class_map(opened(run, "same"), OURS, "same") is None
    every = read_class_map(opened(run, "same"), OURS, "names")
    assert every.student_class.tolist() == [0, 1, 2, 3]
    assert every.has_all_classes


def test_classes_are_matched_by_a_table(run):
    found = read_class_map(opened(run, "fine"), OURS, FINE_TABLE)
    assert found.student_class.tolist() == FINE.student_class.tolist()
    assert found.has_all_classes


def test_unknown_class_names_are_errors_with_the_nearest(run):
    with pytest.raises(RecipeError) as raised:
        read_class_map(opened(run, "fine"), OURS, {"tabbi": "a"})
    assert "no class 'tabbi'; did you mean 'tabby'" in str(raised.value)
    assert "the teacher of" in str(raised.value)
    with pytest.raises(RecipeError, match="the data set has no class 'A1'; (did you mean 'a'|its classes are a, b, c)"):
        read_class_map(opened(run, "fine"), OURS, {"tabby": "A1"})


def test_duplicate_class_names_are_errors(run):
    for config in ("names", {"crane": "c"}):
        images = dataclasses.replace(OURS, class_names=("a", "b", "crane", "d"))
        with pytest.raises(RecipeError, match="has 2 classes named 'crane'"):
            read_class_map(opened(run, "twins"), images, {"crane": "crane"} if config != "names" else config)
    assert read_class_map(opened(run, "twins"), OURS, "names").student_class.tolist() == [0, 1, -1, -1]


def test_data_sets_without_shared_names_need_a_table(run):
    other = dataclasses.replace(OURS, class_names=("w", "x", "y", "z"))
    with pytest.raises(
        RecipeError, match=r"share no class names \(d, tabby, b, \.\.\.; w, x, y, \.\.\.\): map them with a table"
    ):
        read_class_map(opened(run, "fine"), other, "names")


def test_different_numbers_of_classes_are_an_error(run):
    with pytest.raises(StoreError, match=r"has logits of 6 classes, the data set has 4: .*student\.teachers\.classes"):
        join(opened(run, "fine"), OURS, [])


def test_teacher_with_finer_classes_trains_a_student(run):
    task = task_of(run, ["fine"], (FINE_TABLE,))
    batch, ids, _ = whole_batch(task)
    assert batch.has_targets is None
    logits = stored(run, "fine", ids)
    given = (logits / 4).softmax(1)[:, [0, 1, 2, 4, 5]]
    given = given / given.sum(1, keepdim=True)
    target = torch.stack([given[:, 1] + given[:, 3], given[:, 2], given[:, 4], given[:, 0]], 1)
    student = drawn(60, 4, seed=4).float()
    expected = kd_loss(student, 4 * target.log(), 4.0).mean().item()
    assert losses_of(task, student, batch)["kd_0"].item() == pytest.approx(expected, rel=1e-5)


def test_unlabeled_samples_stay_so_in_mapped_classes(run):
    task = task_of(run, ["unlabeled"], (FINE_TABLE,), images=with_unlabeled(OURS))
    batch, ids, labels = whole_batch(task)
    assert batch.has_targets is None
    assert labels[ids % 3 == 0].tolist() == [-1] * int((ids % 3 == 0).sum())
    with pytest.raises(FingerprintMismatch, match=r"label of sample \d+: stored -1, wanted [0123]"):
        task_of(run, ["unlabeled"], (FINE_TABLE,))


def test_samples_of_classes_without_a_teacher_are_an_error(run):
    absent = int((OURS.labels >= 2).sum())
    sentence = f"{absent} of the samples are in no store, or of classes that no teacher has: .*'hard-labels'"
    with pytest.raises(StoreError, match=sentence):
        task_of(run, ["ab"], ("names",))


def test_samples_without_a_teacher_can_use_labels_alone(run):
    task = task_of(run, ["ab"], ("names",), missing="hard-labels")
    batch, ids, labels = whole_batch(task)
    known = labels < 2
    assert torch.equal(batch.has_targets, known)
    assert task.targets.num_without_targets == int((~known).sum())
    target = stored(run, "ab", ids[known])[:, [1, 0]]
    student = drawn(60, 4, seed=4).float()
    losses = losses_of(task, student, batch)
    logs = torch.cat([target, torch.full((len(target), 2), -1e4)], 1)
    expected = kd_loss(student[known], logs, 4.0).sum().item() / 60
    assert losses["kd_0"].item() == pytest.approx(expected, rel=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    expected = torch.where(known, 0.1 * cross_entropy, cross_entropy).mean().item()
    assert losses["hard_labels"].item() == pytest.approx(expected, rel=1e-5)


def test_teachers_of_parts_of_the_classes_combine(run):
    """a from one teacher, c from the other, b from the mean of both."""
    images = OURS.take((OURS.labels < 3).nonzero()[:, 0])
    task = task_of(run, ["ab", "bc"], ("names", "names"), images=images, ensemble="probabilities")
    batch, ids, labels = whole_batch(task)
    target = torch.zeros(len(ids), 4)
    for name, classes, columns in (("ab", [1, 0], [0, 1]), ("bc", [1, 2], [0, 1])):
        known = torch.isin(labels, torch.tensor(classes))
        given = torch.zeros(int(known.sum()), 4)
        given[:, classes] = (stored(run, name, ids[known])[:, columns] / 4).softmax(1)
        target[known] += given / torch.where(labels[known] == 1, 2, 1)[:, None]
    torch.testing.assert_close(target.sum(1), torch.ones(len(ids)))
    student = drawn(len(ids), 4, seed=4).float()
    own = (student / 4).log_softmax(1)
    expected = 16 * (torch.xlogy(target, target) - target * own).sum(1).mean().item()
    assert losses_of(task, student, batch)["kd_0"].item() == pytest.approx(expected, rel=1e-5)


def test_logits_of_different_classes_cannot_be_averaged(run):
    with pytest.raises(RecipeError, match=r"ab\.zarr lacks some .* set student\.teachers\.ensemble = 'probabil"):
        task_of(run, ["same", "ab"], ("same", "names"))
    task_of(run, ["same", "fine"], ("same", FINE_TABLE))  # this teacher has all classes


@pytest.mark.parametrize("loss", [LogitMSE(loss="logit_mse"), kd(standardize=True)], ids=["logit_mse", "standardize"])
def test_losses_on_all_logits_need_a_teacher_of_all_classes(run, loss):
    sentence = rf"distill\.0 \({loss.loss}\) needs the logits of all classes, and a teacher lacks some"
    of_all = {"ensemble": "probabilities", "missing": "hard-labels"}
    with pytest.raises(RecipeError, match=sentence):
        task_of(run, ["ab"], ("names",), [loss], **of_all)
    for store in (None, 1):
        with pytest.raises(RecipeError, match=sentence):
            task_of(run, ["same", "ab"], ("same", "names"), [dataclasses.replace(loss, store=store)], **of_all)
    task_of(run, ["same", "ab"], ("same", "names"), [dataclasses.replace(loss, store=0)], **of_all)
    task_of(run, ["fine"], (FINE_TABLE,), [loss])


@pytest.mark.parametrize("missing", ["error", "hard-labels"])
def test_store_of_other_samples_is_an_error(run, missing):
    """No id is in the store."""
    others = dataclasses.replace(OURS, sample_ids=OURS.sample_ids + 10_000)
    with pytest.raises(StoreError, match=r"no targets for 60 of the 60 samples, .*: it was made from another data set"):
        task_of(run, ["fine"], (FINE_TABLE,), images=others, missing=missing)


def test_store_without_samples_of_mapped_classes_is_an_error(run):
    images = OURS.take((OURS.labels == 3).nonzero()[:, 0])
    sentence = r"none of the \d+ samples in a class that student\.teachers\.classes maps"
    with pytest.raises(StoreError, match=sentence):
        task_of(run, ["fine"], ({"b": "b"},), images=images, missing="hard-labels")


def test_samples_with_other_pixels_are_errors(run):
    images = OURS.take(torch.arange(60))
    images.images[7, 0, 3, 3] += 1
    with pytest.raises(FingerprintMismatch, match=rf"pixel checksum of sample {images.sample_ids[7]}: stored \d+"):
        task_of(run, ["fine"], (FINE_TABLE,), images=images)


def test_samples_mapped_to_a_wrong_class_are_errors(run):
    swapped = {**FINE_TABLE, "b": "c", "c": "b"}
    with pytest.raises(FingerprintMismatch, match=r"label of sample \d+: stored [12], wanted [12]"):
        task_of(run, ["fine"], (swapped,))


def test_other_views_are_an_error(run):
    context = tiny_context(run, train_set=OURS, test_set=TEST)
    context = dataclasses.replace(context, views=dataclasses.replace(VIEWS, operations=OPERATIONS[:1]))
    student = dataclasses.replace(STUDENT, teachers=TeachersConfig(classes=(FINE_TABLE,)))
    with pytest.raises(FingerprintMismatch, match=r"views\.operations: stored"):
        open_distillation([run / "fine.zarr"], [kd()], student, {}, context)
