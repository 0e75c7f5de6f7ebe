"""Losses of users train, resume, compress and compare like built-in ones; an edited source is refused."""

import dataclasses
import importlib
import json
import sys

import pytest
from support import user_losses
from support.tiny_run import CACHE, STUDENT, TEACHER, StopAfter, make_tiny_store, tiny_context

from kdpipe.pipeline.steps import cache_teacher, train_student
from kdpipe.stages.compress.compress import CompressConfig, compress, compressed_root
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import student_shapes
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.losses.distillation import required_of
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.registry import loss_class
from kdpipe.stages.losses.user_loss import as_loss
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.train_student.compare import Variant
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import FingerprintMismatch

LOSSES = (
    loss_class("python:support.user_losses:logit_mae")(margin=0.1),
    as_loss(user_losses.batch_spread, "spread.v2")(weight=0.1),
    as_loss(user_losses.Projected, "projected")(),
    as_loss(user_losses.LogitMAE, "mae")(),
    as_loss(user_losses.ChannelMeans, "means")([("stage1", "stage2")]),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run folder with a store of what the losses require."""
    folder = tmp_path_factory.mktemp("user_losses")
    context = tiny_context(folder)
    make_tiny_store(context)
    wanted = required_of(LOSSES, student_shapes(STUDENT, LOSSES, context), 0)
    assert [str(feature) for feature in wanted] == ["stage2:pooled"]
    cache_teacher(CACHE, folder / "store.zarr", load_teacher(TEACHER, 0, context), wanted, context)
    return folder


def train(run, losses, folder, monitor=None, config=STUDENT):
    context = tiny_context(run, monitor)
    spec = open_distillation([run / "store.zarr"], losses, config, {}, context)
    student_run = StudentRun(JobDir(folder), "a student", with_onnx=False)
    train_student(config, 0, spec, context, student_run=student_run)
    return student_run.job_dir


def test_stopped_training_with_all_kinds_is_identical(run, tmp_path):
    whole = train(run, LOSSES, tmp_path / "whole")
    with pytest.raises(StoppedEarly):
        train(run, LOSSES, tmp_path / "stopped", RunMonitor(should_stop=StopAfter(9)))
    stopped = train(run, LOSSES, tmp_path / "stopped")
    assert stopped.model.read_bytes() == whole.model.read_bytes()
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    names = ["hard_labels", "logit_mae_0", "spread_v2_1", "projected_2", "mae_3", "means_4"]
    assert list(lines[0]["losses"]) == names
    assert lines[1]["losses"]["projected_2"] < lines[0]["losses"]["projected_2"]


def test_student_is_pruned_and_quantized_with_the_losses(run, tmp_path):
    context = tiny_context(run)
    spec = open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, context)
    train_student(STUDENT, 0, spec, context)
    short = dataclasses.replace(STUDENT.train, epochs=1, lr=0.001)
    config = CompressConfig(
        niceness=0,
        baselines=False,
        prune=PruneConfig(ratio=0.5, round_to=1),
        prune_train=short,
        quantize=QuantizeConfig(calibration_batches=2),
        quantize_train=short,
        latency_rounds=3,
    )
    fine_tuning = build_fine_tuning(STUDENT, 0, spec, context, compressed_root(context.run_dir, config))
    assert set(compress(config, fine_tuning, only=("prune", "quantize"))) == {"pruned", "int8"}


SOURCE = """
def loss(student_logits, teacher_logits):
    return {factor} * (student_logits - teacher_logits).abs().mean(1)
"""


def loss_from(folder, factor):
    """Return the loss of a module written again and imported again, as by another process."""
    (folder / "edited_loss.py").write_text(SOURCE.format(factor=factor))
    sys.modules.pop("edited_loss", None)
    importlib.invalidate_caches()
    return loss_class("python:edited_loss:loss")()


def test_edited_source_does_not_resume(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoppedEarly):
        train(run, [loss_from(tmp_path, 1)], tmp_path / "student", RunMonitor(should_stop=StopAfter(9)))
    with pytest.raises(FingerprintMismatch, match="source_sha256"):
        train(run, [loss_from(tmp_path, 2)], tmp_path / "student")
    assert train(run, [loss_from(tmp_path, 1)], tmp_path / "student").model.exists()


def test_edited_source_is_another_variant(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def variant(loss):
        spec = open_distillation([run / "store.zarr"], [loss], STUDENT, {}, tiny_context(run))
        return Variant("own", STUDENT, spec).digest

    first, same, edited = (
        variant(loss_from(tmp_path, 1)),
        variant(loss_from(tmp_path, 1)),
        variant(loss_from(tmp_path, 2)),
    )
    assert first == same != edited


def test_built_in_losses_keep_their_fingerprint(run):
    spec = open_distillation([run / "store.zarr"], [KD(temperature=2)], STUDENT, {}, tiny_context(run))
    assert spec.to_json()["losses"] == [{"loss": "kd", "weight": 0.9, "temperature": 2.0}]
