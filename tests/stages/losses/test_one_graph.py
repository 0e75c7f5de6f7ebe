"""torch.compile traces each loss as one graph, and it computes the same."""

import pytest
import torch
from support.loss_inputs import STUDENT_HINTS, STUDENT_MAPS, TEACHER_HEAD, TEACHER_HINTS, TEACHER_MAPS, build_loss

from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.models.tokens import CAM, PRE_LOGITS
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD as TEACHER_HEAD_SPEC

PAIR = (("a", "b"),)
ON_MAPS = ("cosine", "pefd", "srd", "vkd", "ab", "ft", "ofd", "cat_kd", "cwd", "wkd_f")
ON_LOGITS = ("kd", "ttm", "wttm", "wsld", "wkd_l", "gkl", "hard_distillation")
OPTIONS = {**{name: {"layers": PAIR} for name in ON_MAPS}, **{name: {} for name in ON_LOGITS}}
OPTIONS |= {"srrl": {"layer": "a"}, "simkd": {"layers": (("c", "d"),)}}
SIGNED = TEACHER_MAPS - 0.5
STUDENT = {"a": STUDENT_MAPS, f"a.{CAM}": STUDENT_MAPS[:, :10], "c": STUDENT_HINTS}
TEACHER = {"b": SIGNED, f"b.{CAM}": SIGNED[:, :10], "d": TEACHER_HINTS, PRE_LOGITS: SIGNED.mean((2, 3))}


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_is_one_graph(name):
    config = LOSSES.get(name)(loss=name, **OPTIONS[name])
    module, inputs = build_loss(config, STUDENT, {**TEACHER, str(TEACHER_HEAD_SPEC): TEACHER_HEAD})
    expected = module(inputs)  # eager first: batch norms remember
    torch._dynamo.reset()
    traced = torch.compile(module, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(traced(inputs), expected)
