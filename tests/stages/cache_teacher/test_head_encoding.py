"""cache.encoding = "head": logits follow from the pooled vector, for every loss, in a store of one array."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from support.tiny_run import CACHE, STUDENT, TEACHER, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher, train_student
from kdpipe.stages.cache_teacher.estimate import plan_cache
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import DISTILLED, student_folder
from kdpipe.stages.distillation.task_builder import student_shapes
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.losses.distillation import required_of
from kdpipe.stages.losses.features.srrl import SRRL
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.pkt import PKT
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.targets.feature_spec import source_shapes
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.targets.resolve import smallest_feature
from kdpipe.stages.teacher import untrained_teacher
from kdpipe.store import FingerprintMismatch, open_store
from kdpipe.store.format.encodings.encoding_error import row_kl

LOSSES = (KD(), SRRL(), RKD(), PKT(), CRD(layers=(("pre_logits", "pre_logits"),), num_negatives=16))
HEAD = dataclasses.replace(CACHE, encoding="head")
POOLING = dataclasses.replace(TEACHER, model=ModelConfig(name="cnn_average", args={"width": 8, "num_stages": 2}))
TRAIN_SET = squares(96, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stores of one teacher: of its logits, and of its vectors in both precisions."""
    context = tiny_context(tmp_path_factory.mktemp("head"), train_set=TRAIN_SET)
    teacher = untrained_teacher(POOLING, 0, context)
    teacher.model.to(context.device).eval()
    shapes = source_shapes(
        teacher.model, wanted := required_of(LOSSES, student_shapes(STUDENT, LOSSES, context), 0), context.image_shape
    )
    layers = [smallest_feature(one, shapes[one.source]) for one in wanted]
    exact = dataclasses.replace(CACHE, dtype="float32")
    for name, config in (("exact", exact), ("float16", HEAD), ("float32", dataclasses.replace(HEAD, dtype="float32"))):
        cache_teacher(config, context.run_dir / name, teacher, layers, context)
    return context, teacher, layers


def logits_of(context, name, view=1):
    """Return the logits as training reads them, and as the store gives them."""
    store = open_store(context.run_dir / name)
    read = Targets([join(store, TRAIN_SET, [])], context.device).batch(view, torch.arange(96))[0].logits_at(4.0)
    assert np.allclose(read.cpu(), store.logits(view, TRAIN_SET.sample_ids.numpy()), atol=1e-5)
    return read.cpu().numpy()


def test_one_array_serves_all_losses_on_vectors(run):
    context, _, _ = run
    store = open_store(context.run_dir / "float16")
    assert [spec.name for spec in store.arrays] == ["features/pre_logits"]
    spec = open_distillation([store.path], LOSSES, STUDENT, {}, context)
    config = dataclasses.replace(STUDENT, train=dataclasses.replace(STUDENT.train, epochs=1), export=False)
    train_student(config, 0, spec, context)
    (epoch,) = student_folder(context.run_dir, DISTILLED, 0).metrics.read_text().splitlines()
    assert {"kd_0", "srrl_1", "rkd_2", "pkt_3", "crd_4"} < set(json.loads(epoch)["losses"])


def test_float32_is_exact_to_rounding_and_float16_close(run):
    context, _, _ = run
    exact = logits_of(context, "exact")
    scale = np.abs(exact).max()
    assert np.abs(logits_of(context, "float32") - exact).max() < 3e-6 * scale
    for temperature in (1.0, 4.0, 20.0):
        assert row_kl(exact, logits_of(context, "float16"), temperature).mean() < 1e-6


def test_fidelity_is_that_of_the_logits(run):
    context, _, _ = run
    figures = {name: open_store(context.run_dir / name).fidelity for name in ("float16", "float32")}
    assert set(figures["float16"]) == {"features/pre_logits", "logits"}
    assert figures["float32"]["logits"]["largest_error"] < figures["float16"]["logits"]["largest_error"] < 1e-2
    assert set(figures["float16"]["logits"]["kl"]) == {"1", "2", "4", "8", "20"}


def test_recheck_compares_the_logits(run):
    context, teacher, _ = run
    assert recompute(context.run_dir / "float16", teacher, context, 20, seed=0).differing == ()
    with torch.no_grad():
        changed = untrained_teacher(POOLING, 0, context)
        changed.model.to(context.device).eval().fc.weight.mul_(1.5)
    with pytest.raises(FingerprintMismatch):
        recompute(context.run_dir / "float16", changed, context, 20, seed=0)


def test_recipes_of_other_encodings_are_refused(run):
    context, teacher, layers = run
    for config, name, stored, wanted in (
        (HEAD, "exact", "stored", "from the head"),
        (CACHE, "float16", "from the head", "stored"),
    ):
        with pytest.raises(FingerprintMismatch, match=f"logits.*{stored}.*{wanted}"):
            cache_teacher(config, context.run_dir / name, teacher, layers, context)
    with pytest.raises(RecipeError, match=r"cache.encoding and cache.top_k each say how logits are stored"):
        cache_teacher(dataclasses.replace(HEAD, top_k=2), context.run_dir / "new", teacher, layers, context)


def test_plan_counts_vectors_and_head(run):
    context, teacher, layers = run
    plan = plan_cache(HEAD, context.run_dir / "new", teacher, layers, context, trained=True)
    assert plan["head"] == {"shape": [4, 17], "store_bytes": 4 * 4 * 17}
    assert plan["missing_bytes"] == plan["store_bytes"] == plan["arrays"]["features/pre_logits"]["store_bytes"] + 272
    assert plan_cache(HEAD, context.run_dir / "float16", teacher, layers, context, trained=True)["missing_bytes"] == 0


def test_teachers_without_a_linear_head_are_refused(run, tmp_path):
    context = run[0]
    teacher = untrained_teacher(POOLING, 0, context)
    teacher.model.fc = torch.nn.Sequential(teacher.model.fc, torch.nn.Softmax(1))
    with pytest.raises(ModelError, match="the teacher's head cannot be stored: "):
        cache_teacher(HEAD, tmp_path / "store", teacher, [], context)
