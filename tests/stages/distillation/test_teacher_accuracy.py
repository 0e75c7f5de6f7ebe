"""The teachers' logits of the test images are read batch by batch, from memory or from mapped files alike."""

import torch
from support.tiny_run import CACHE, TEACHER, make_tiny_store, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages import context as contexts
from kdpipe.stages.distillation import teacher_accuracy
from kdpipe.stages.distillation.teacher_accuracy import teacher_logits
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
    assert teacher_accuracy.deciding_accuracies([place], TeachersConfig(), context) == [float(accuracy)]
