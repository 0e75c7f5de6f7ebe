"""Teachers' outputs are combined on a GPU without a wait for it: in each step, between the host's launches."""

import numpy as np
import pytest
import torch
from support.device import DEVICE, needs_gpu, without_waits

from kdpipe.stages.targets.class_map import ClassMap
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.outputs import DenseTargets, TopKTargets, TransformedTargets
from kdpipe.store import TopK, default_temperatures, encode_topk

pytestmark = needs_gpu

TOP_K = TopK(6, 2, default_temperatures())
CLASSES = ClassMap(np.array([3, 0, 1, -1, 0, 2]), 4)


def top_k(logits):
    packed = encode_topk(logits.numpy(), TOP_K, "float32")
    arrays = [torch.from_numpy(packed[f"logits/{name}"]).to(DEVICE) for name in ("values", "indices", "tail")]
    return TopKTargets(TOP_K, *arrays, {})


@pytest.mark.parametrize("make", [top_k, lambda logits: DenseTargets(logits.to(DEVICE), {})], ids=["top-k", "dense"])
def test_logits_are_computed_without_a_wait(make):
    outputs = [TransformedTargets(make(torch.randn(8, 6)), CLASSES.map_logits) for _ in range(2)]
    labels, ensemble = torch.zeros(8, dtype=torch.int64, device=DEVICE), TeacherEnsemble(TeachersConfig(), 2)
    with without_waits():
        ensemble(outputs, [None, torch.ones(8, dtype=torch.bool)], labels).logits_at(4.0)
