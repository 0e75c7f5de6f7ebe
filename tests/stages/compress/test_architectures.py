"""Tests of compressing residual, depthwise and attention networks end to end; test_compress.py has plain ones."""

import dataclasses
import shutil

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support.tiny_run import TEACHER, TRAIN, StopAfter, make_tiny_store, squares, tiny_context

from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import CompressConfig, compress, compressed_root
from kdpipe.stages.compress.fine_tune import FineTuneContext, build_fine_tuning
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.evaluation.evaluate import evaluate
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import float_nodes, op_counts
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job_dir import read_json_file

FAMILIES = {
    "residual": ModelConfig(name="resnet8"),
    "depthwise": ModelConfig(name="python:support.tiny_families:mobilenet"),
    "attention": ModelConfig(name="python:support.tiny_families:vit"),
}
FINE = dataclasses.replace(TRAIN, epochs=2, lr=0.01, checkpoint_every_s=30)  # and where it is stopped


def enlarged(image_set):
    """Return images of 16 x 16 pixels in three colors."""
    images = image_set.images.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 3, 1, 1)
    return dataclasses.replace(image_set, images=images)


def setup_in(run, monitor=None):
    return tiny_context(run, monitor, train_set=enlarged(squares(96, 0)), test_set=enlarged(squares(60, 1, "test")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    make_tiny_store(setup_in(folder), teacher=dataclasses.replace(TEACHER, train=FINE))
    return folder


def save_trained_student(student, context, path):
    """Train the student for some steps, until it is confident, and save it."""
    network = build_student(student, 0, context)
    optimizer = torch.optim.AdamW(network.model.parameters(), lr=0.003)
    torch.manual_seed(0)
    for _ in range(40):
        at = torch.randint(96, (32,))
        images, labels = network.normalize(context.train_set.images[at]), context.train_set.labels[at]
        optimizer.zero_grad()
        F.cross_entropy(network.model(images), labels).backward()
        optimizer.step()
    torch.save(network.model.state_dict(), path)


def config_for(path):
    return CompressConfig(
        niceness=0,
        baselines=False,
        student=str(path),
        prune=PruneConfig(ratio=0.5, round_to=8),
        prune_train=FINE,
        quantize=QuantizeConfig(calibration_batches=3),
        quantize_train=dataclasses.replace(FINE, lr=0.001),
        latency_batch_sizes=(1,),
        latency_rounds=3,
    )


def compress_with_stops(config, student, run):
    for _ in range(100):
        context = setup_in(run, RunMonitor(should_stop=StopAfter(9)))
        spec = open_distillation([run / "store.zarr"], (KD(loss="kd"),), student, {}, context)
        try:
            return compress(
                config, build_fine_tuning(student, 0, spec, context, compressed_root(context.run_dir, config))
            )
        except StoppedEarly:
            pass
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_quantized_and_rebuilt(run, tmp_path, monkeypatch, family):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)  # one ONNX file, below, is enough
    student = StudentConfig(model=FAMILIES[family], train=TRAIN, seeds=(0,))
    context = setup_in(run)
    save_trained_student(student, context, tmp_path / f"{family}.pt")
    shutil.copy(tmp_path / f"{family}.pt", tmp_path / f"{family}-again.pt")
    figures = compress_with_stops(config_for(tmp_path / f"{family}.pt"), student, run)
    spec = open_distillation([run / "store.zarr"], (KD(loss="kd"),), student, {}, context)
    again = config_for(tmp_path / f"{family}-again.pt")
    compress(again, build_fine_tuning(student, 0, spec, context, compressed_root(context.run_dir, again)))

    # A quantization-aware training that is stopped again and again ends in the very same weights.
    root = run / f"compressed-{family}"
    for kind in ("pruned", "int8"):
        first = load_tensors(root / f"{kind}-seed0" / "model.safetensors")[0]
        second = load_tensors(run / f"compressed-{family}-again" / f"{kind}-seed0" / "model.safetensors")[0]
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    given = read_json_file(root / "given" / "result.json")
    assert figures["pruned"]["num_parameters"] < (0.85 if family == "attention" else 0.5) * given["num_parameters"]

    # Pruned and INT8, it is built again from its own record, says the same, and so does its file.
    test = context.evaluation(build_student(student, 0, context).normalize)
    for kind in ("pruned", "int8"):
        rebuilt = rebuild(root / f"{kind}-seed0" / "model.safetensors", trust_python=True)
        assert evaluate(rebuilt.model.to(context.device), test, context.device).value == figures[kind]["accuracy"]
    export_onnx(rebuilt.model, torch.zeros(2, *context.image_shape), path := tmp_path / "model.onnx", metadata={})
    agreement = check_onnx(path, rebuilt.model, test.batches())
    assert agreement.agreement >= 0.98
    session = onnxruntime.InferenceSession(path)
    assert session.run(["logits"], {"images": test.images(1).cpu().numpy()})[0].shape == (1, 4)

    # Really fused: integers throughout, but for what attention computes in float.
    floats, counts = [str(node) for node in float_nodes(path)], op_counts(path)
    if family == "attention":
        assert any("Softmax" in node for node in floats)
        assert any("attention" in why for why in figures["pruned"]["excluded"].values())
    else:
        assert floats == []
        assert counts["QLinearConv"] >= 5 and "Conv" not in counts
