"""The teachers' logits of the test images are read batch by batch, from memory or from mapped files alike."""

from dataclasses import replace

import pytest
import torch
from support.tiny_run import CACHE, TEACHER, make_tiny_store, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages import context as contexts
from kdpipe.stages.distillation import teacher_accuracy
from kdpipe.stages.distillation.teacher_accuracy import deciding_accuracies, teacher_logits
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets import open as opening
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.reader import TargetLoadingConfig
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import open_store


def test_logits_are_those_of_the_store_at_any_size(tmp_path, without_onnx, monkeypatch):
    context = tiny_context(tmp_path)
    place = make_tiny_store(context)
    assert teacher_logits([place], TeachersConfig(), context) is None  # there is no test store yet
    path = opening.test_store_path(place)
    cache_teacher(CACHE, path, load_teacher(TEACHER, 0, context), [], contexts.test_context(context))
    expected = torch.from_numpy(open_store(path).gather("logits", 0, context.test_set.sample_ids.numpy())).float()
    positions = torch.tensor([3, 0, 79])
    assert torch.equal(teacher_logits([place], TeachersConfig(), context)(positions), expected[positions])

    monkeypatch.setattr(teacher_accuracy, "TEST_LOADING", TargetLoadingConfig(memory_bytes=0, mapped_bytes=2**60))
    monkeypatch.setattr(teacher_accuracy, "BATCH_SIZE", 33)
    mapped = teacher_logits([place], TeachersConfig(), context)
    assert mapped.targets.residence == "mapped"
    assert torch.equal(mapped(positions), expected[positions])
    accuracy = (expected.argmax(1) == context.test_set.labels).float().mean()
    assert deciding_accuracies([place], TeachersConfig(), context) == [float(accuracy)]


def test_validation_images_decide_the_weights_of_teachers(tmp_path, without_onnx):
    said = []
    context = tiny_context(tmp_path, RunMonitor(lambda event: said.append(event.job)))
    place = make_tiny_store(context)
    context = replace(context, validation_set=replace(squares(60, 5), split="validation"))
    config = TeachersConfig(weights="accuracy")
    with pytest.raises(RecipeError, match=r"validation store \(store\.validation\.zarr\)"):
        deciding_accuracies([place], config, context)
    teacher, path = load_teacher(TEACHER, 0, context), opening.part_store_path(place, "validation")
    cache_teacher(CACHE, path, teacher, [], contexts.test_context(context.deciding))
    logits = torch.from_numpy(open_store(path).gather("logits", 0, context.validation_set.sample_ids.numpy()))
    accuracy = (logits.argmax(1) == context.validation_set.labels).float().mean()
    said.clear()
    assert deciding_accuracies([place, place], config, context) == [float(accuracy)] * 2
    assert said == []
    cache_teacher(CACHE, opening.test_store_path(place), teacher, [], contexts.test_context(context))
    deciding_accuracies([place, place], config, replace(context, validation_set=None))
    assert [line for line in said if "on the test images" in line and "data.validation_share" in line]
