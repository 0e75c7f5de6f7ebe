"""Losses that do not go together with the recipe's other settings are refused before anything is trained."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.many_stores import LOGITS, Wish, grow
from support.tiny_run import squares

from kdpipe.stages.context import StageContext
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.distillation.compatibility import (
    check_combination,
    check_labels,
    check_losses,
    class_warnings,
    require_logits,
    require_no_logits,
)
from kdpipe.stages.distillation.embedding_student import check_output
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.cosine import Cosine
from kdpipe.stages.losses.logits.binary_kd import BinaryKD
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD, LogitMSE
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.losses.logits.wkd import WKDL
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.losses.statistics.at import ATGradient
from kdpipe.stages.losses.statistics.cat_kd import CATKD
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.class_map import ClassMap
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.views.config import Views
from kdpipe.store import StoreError, open_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One store of each encoding of the logits."""
    folder = tmp_path_factory.mktemp("encodings")
    return {name: open_store(grow(folder / name, Wish(form, num_samples=20))) for name, form in LOGITS.items()}


@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (DKD(), r"\(dkd\): it is not linear in the teacher's probabilities"),
        (KD(temperature=1.0, rest="student"), "rest = 'student' is not linear"),
        (KD(temperature=1.0, standardize=True), "needs the logits of all classes, .* has 8 of 20 classes sampled"),
        (LogitMSE(), "needs the logits of all classes"),
        (KD(temperature=1.0, samples={"weighting": "entropy"}), "of which .* has samples only"),
    ],
)
def test_sampled_labels_are_for_linear_losses(stores, loss, fault):
    with pytest.raises(RecipeError, match=fault):
        require_logits([stores["sampled"]], [loss], TeachersConfig())
    require_logits([stores["int4"]], [loss], TeachersConfig())


def test_sampled_labels_are_for_temperature_one(stores):
    sampled = stores["sampled"]
    with pytest.raises(StoreError, match="at T = 1, not at 4"):
        require_logits([sampled], [KD()], TeachersConfig())
    with pytest.raises(StoreError, match="at T = 1, not at 2"):
        require_logits([sampled], [KD(temperature=1.0)], TeachersConfig(temperatures=(2.0,)))
    with pytest.raises(RecipeError, match="averages logits.*set student.teachers.ensemble = 'probabilities'"):
        require_logits([sampled, stores["int4"]], [KD(temperature=1.0)], TeachersConfig())
    teachers = TeachersConfig(ensemble="probabilities")
    require_logits([sampled, stores["int4"]], [KD(temperature=1.0), RKD()], teachers)


@pytest.mark.parametrize("loss", [NKD(), MLLD()])
def test_temperatures_of_teachers_do_not_replace_several(loss):
    teachers = TeachersConfig(temperatures=(4.0, 2.0))
    with pytest.raises(RecipeError, match=r"distill.0 \((nkd|mlld)\) takes .* at several temperatures"):
        check_losses([loss], Views(), teachers)
    check_losses([type(loss)(store=1), KD()], Views(), teachers)


@pytest.mark.parametrize("loss", [CRD(layers=(("a", "b"),)), DKD(), NKD()])
def test_losses_with_other_classes_refuse_mixed_samples(loss):
    with pytest.raises(RecipeError, match="needs a single label per sample"):
        check_losses([loss], Views(mix={"mixup_alpha": 0.2}), TeachersConfig())


def test_parts_that_two_classes_make_constant_are_told():
    losses = [DKD(), KD(), NKD(), DIST()]
    assert [text.partition(":")[0] for text in class_warnings(losses, 2)] == [
        "distill.0 (dkd)",
        "distill.2 (nkd)",
        "distill.3 (dist)",
    ]
    assert list(class_warnings(losses, 3)) == []


def test_losses_are_for_the_outputs_of_their_tasks():
    with pytest.raises(RecipeError, match=r"\(binary_kd\) is for multilabel, and data.task is 'class.*use kd"):
        check_labels([BinaryKD()], TeachersConfig(), squares(10, 0))
    check_labels([LogitMSE(standardize=True)], TeachersConfig(), squares(10, 0))


def test_losses_of_labels_need_some():
    none, few, teachers = (keep_labels(squares(40, 0), kept) for kept in ("none", 8, "all"))
    crd, at_gradient = CRD(layers=(("a", "b"),)), ATGradient()
    for loss in (DKD(), NKD(), KD(samples={"filter": "correct"})):
        with pytest.raises(RecipeError, match=rf"distill.0 \({loss.loss}\).* needs labels"):
            check_labels([loss], TeachersConfig(), none)
        check_labels([loss], TeachersConfig(), few)
    with pytest.raises(RecipeError, match="32 of 40 training images have none"):
        check_labels([at_gradient], TeachersConfig(), few)
    with pytest.raises(RecipeError, match="weights = 'confidence' needs labels"):
        check_labels([KD()], TeachersConfig(weights="confidence"), none)
    check_labels([KD(), crd], TeachersConfig(), none)
    check_labels([at_gradient, DKD()], TeachersConfig(weights="confidence"), teachers)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (KD(), r"distill.1 \(kd\) needs the teacher's logits: .* such as cosine, hint, rkd"),
        (KD(store=1), "needs the teacher's logits"),
        (ATGradient(store=1), "needs the teacher's logits"),
        (Cosine(store=1, samples={"filter": "hard"}), "selects samples by the teacher's logits"),
    ],
)
def test_a_store_of_embeddings_refuses_losses_on_logits(loss, sentence):
    with pytest.raises(RecipeError, match=sentence):
        require_no_logits([Cosine(store=1), loss], 1)


def test_other_stores_have_their_logits():
    require_no_logits([KD(store=0), Cosine(store=1), RKD(store=1), Cosine(samples={"filter": "hard"})], 1)


@pytest.mark.parametrize(
    ("output", "losses", "labels", "of_embeddings", "fault"),
    [
        ("logits", [Cosine()], "none", True, "nothing trains the student's classifier"),
        ("embeddings", [Cosine(), KD()], "none", True, "kd trains it"),
        ("embeddings", [Cosine()], "all", True, "is for images without labels"),
        ("embeddings", [Cosine()], "none", False, "no store is of one"),
        ("embeddings", [Cosine(), RKD()], "none", True, None),
        ("logits", [Cosine()], "all", True, None),
        ("logits", [KD()], "none", False, None),
    ],
)
def test_a_student_returns_what_something_trains(output, losses, labels, of_embeddings, fault, tmp_path):
    train_set = keep_labels(squares(8, seed=0), labels)
    config = StudentConfig(model={"name": "cnn"}, output=output)
    context = StageContext(tmp_path, train_set, train_set, Views(), torch.device("cpu"), RunMonitor())
    with pytest.raises(RecipeError, match=fault) if fault else nullcontext():
        check_output(config, losses, context, of_embeddings=of_embeddings)


@pytest.mark.parametrize(
    ("loss", "class_maps", "teachers", "fault"),
    [
        (WKDL(), [None, None], {}, "combines logits: select one teacher with distill.store"),
        (WKDL(), [None], {"temperatures": (2.0,)}, "combines logits: select one teacher with distill.store"),
        (WKDL(store=0), [ClassMap(np.arange(3), 3), None], {}, "its classes are not the student's"),
        (CATKD(layers=(("a", "b"),)), [ClassMap(np.arange(3), 3), None], {}, "its classes are not the student's"),
        (WKDL(store=1), [None, None], {}, None),
        (CATKD(layers=(("a", "b"),)), [None, None], {}, None),
    ],
)
def test_losses_that_compare_classes_have_one_teacher(loss, class_maps, teachers, fault):
    spec = SimpleNamespace(losses=[loss], teachers=TeachersConfig(**teachers), missing_targets="error")
    sources = [SimpleNamespace(class_map=one, store=None) for one in class_maps]
    targets = SimpleNamespace(num_without_targets=0, residence="memory")
    with pytest.raises(RecipeError, match=fault) if fault else nullcontext():
        check_combination(spec, sources, targets)
