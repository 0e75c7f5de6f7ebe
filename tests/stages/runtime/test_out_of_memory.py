"""Tests of inference in chunks after memory ran out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail as OnnxFailure
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, TEACHER, make_tiny_store, tiny_context
from torch import Tensor, nn

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.inference import teacher_forward
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.data.loader.labels import hard_labels_of
from kdpipe.stages.evaluation.evaluate import predict
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.events import WARNING, ProgressEvent, RunMonitor
from kdpipe.stages.runtime.memory import is_out_of_memory, run_in_chunks
from kdpipe.stages.targets.feature_spec import INPUT, INPUT_GRADIENT, FeatureSpec
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import open_store

EVERYTHING = [*LAYERS, FeatureSpec(INPUT, INPUT_GRADIENT)]


def small_memory(model: nn.Module, num_rows: int) -> list[int]:
    """Let `model` be out of memory with more than `num_rows` images; the sizes of its batches are noted down."""
    sizes_seen: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes_seen.append(len(inputs[0]))
        if len(inputs[0]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(note)
    return sizes_seen


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose teacher is trained and cached."""
    folder = tmp_path_factory.mktemp("run")
    make_tiny_store(tiny_context(folder))
    return folder


@pytest.fixture
def context(run: Path, warnings: list[str]) -> StageContext:
    def report(event: ProgressEvent) -> None:
        if event.unit == WARNING:
            warnings.append(event.job)

    return tiny_context(run, monitor=RunMonitor(report))


def limited(most: int) -> tuple[Callable[[slice], list[int]], list[int]]:
    """Return a function that returns its rows, at most `most` at once, and the sizes that it was called with."""
    sizes: list[int] = []

    def run(rows: slice) -> list[int]:
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > most:
            raise MemoryError
        return list(range(rows.start, rows.stop))

    return run, sizes


def test_chunks_cover_rows_in_order_and_size_is_remembered() -> None:
    model, messages = nn.Identity(), list[str]()
    run, sizes = limited(7)
    assert [row for rows in run_in_chunks(model, 23, run, messages.append) for row in rows] == list(range(23))
    assert sizes == [23, 12, 6, 6, 6, 5]
    sizes.clear()
    assert [row for rows in run_in_chunks(model, 10, run, messages.append) for row in rows] == list(range(10))
    assert sizes == [6, 4]
    assert messages == ["out of memory with batches of 23: continuing with 6."]


def test_batch_that_fits_is_not_divided() -> None:
    run, sizes = limited(23)
    assert [row for rows in run_in_chunks(nn.Identity(), 23, run) for row in rows] == list(range(23))
    assert sizes == [23]


def test_chunks_can_shrink_again_later() -> None:
    most, model, messages = [8], nn.Identity(), list[str]()

    def run(rows: slice) -> int:
        size = rows.stop - rows.start
        if size > most[0]:
            raise MemoryError
        most[0] = 4 if rows.start else 8
        return size

    assert list(run_in_chunks(model, 24, run, messages.append)) == [6, 6, 3, 3, 3, 3]
    assert messages == [
        f"out of memory with batches of {before}: continuing with {size}." for before, size in ((24, 6), (6, 3))
    ]


def test_single_row_out_of_memory_and_other_errors_are_raised() -> None:
    with pytest.raises(MemoryError):
        list(run_in_chunks(nn.Identity(), 5, limited(0)[0]))

    def broken(rows: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(run_in_chunks(nn.Identity(), 5, broken))


def test_failed_attempt_is_freed_before_the_next() -> None:
    left: list[weakref.ref[Tensor]] = []

    def run(rows: slice) -> int:
        assert all(computed() is None for computed in left)
        activations = torch.zeros(rows.stop - rows.start, 3)
        left.append(weakref.ref(activations))
        if len(activations) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return len(activations)

    assert sum(run_in_chunks(nn.Identity(), 8, run)) == 8
    assert len(left) == 6


def test_evaluation_continues_in_chunks_and_warns_once(context: StageContext, warnings: list[str]) -> None:
    network = load_teacher(TEACHER, 0, context)
    test, device = context.evaluation(network.normalize), context.device
    (whole,) = predict(network.model, test, device)
    sizes_seen = small_memory(network.model, 30)
    for _ in range(2):
        (answers,) = predict(network.model, test, device)
        assert torch.equal(answers.labels, whole.labels)
        torch.testing.assert_close(answers.logits, whole.logits)
    assert sizes_seen == [80, 40, *[20] * 8]
    assert warnings == ["out of memory with batches of 80: continuing with 20."]


def test_store_is_filled_in_chunks_with_the_same_rows(
    context: StageContext, warnings: list[str], tmp_path: Path
) -> None:
    whole, halved = tmp_path / "whole.zarr", tmp_path / "halved.zarr"
    cache_teacher(CACHE, whole, load_teacher(TEACHER, 0, context), EVERYTHING, context)
    teacher = load_teacher(TEACHER, 0, context)
    sizes_seen = small_memory(teacher.model, 30)
    cache_teacher(CACHE, halved, teacher, EVERYTHING, context)
    assert sizes_seen.count(50) == 1
    assert set(sizes_seen) == {2, 50, 25}  # two show the layers' shapes
    assert warnings == ["out of memory with batches of 50: continuing with 25."]
    one, other = open_store(whole), open_store(halved)
    assert one.manifest.identity.fingerprint == other.manifest.identity.fingerprint
    for name in ("logits", *(feature.array for feature in EVERYTHING)):
        for view in range(3):
            np.testing.assert_allclose(one.read_view(name, view), other.read_view(name, view), rtol=2e-3, atol=2e-3)


def test_teacher_too_large_for_one_image_stops_the_job(context: StageContext, tmp_path: Path) -> None:
    teacher = load_teacher(TEACHER, 0, context)
    path = tmp_path / "other.zarr"
    small_memory(teacher.model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        cache_teacher(CACHE, path, teacher, LAYERS, context)
    cache_teacher(CACHE, path, load_teacher(TEACHER, 0, context), LAYERS, context)
    assert folder_bytes(path) == folder_bytes(context.run_dir / "store.zarr")


def test_chunks_of_teacher_outputs_are_concatenated(context: StageContext) -> None:
    teacher = load_teacher(TEACHER, 0, context)
    batch = context.train_loader.get(ViewRequest(torch.arange(40), 0))
    hard = hard_labels_of(context.train_loader, batch)
    with extract_features(teacher.model, ["stage2"]) as extractor, torch.no_grad():
        whole = teacher_forward(extractor, teacher, batch, EVERYTHING, hard)
        small_memory(teacher.model, 7)
        chunks = teacher_forward(extractor, teacher, batch, EVERYTHING, hard)
    torch.testing.assert_close(chunks.logits, whole.logits)
    assert set(chunks.features) == set(whole.features) == {"stage2", INPUT_GRADIENT}
    for layer, feature in whole.features.items():
        torch.testing.assert_close(chunks.features[layer], feature)


@pytest.mark.parametrize(
    ("error", "memory_ran_out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(path)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (OnnxFailure("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 8"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception, memory_ran_out: bool) -> None:
    assert is_out_of_memory(error) is memory_ran_out
