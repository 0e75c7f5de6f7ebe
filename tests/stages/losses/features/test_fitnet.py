"""FitNet: one stage per pair of layers, each with the hint's loss."""

from __future__ import annotations

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_MAPS, TEACHER_MAPS, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.fitnet import FitNet
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.schedules import Schedule
from kdpipe.stages.targets.feature_spec import FeatureSpec


def test_each_pair_is_one_stage_in_order():
    ramp = Schedule(start=1.0, end=2.0)
    config = FitNet(loss="fitnet", layers=(("a", "b"), ("c", "d"), ("a", "d")), stage_epochs=7, weight=ramp, store=1)
    stages = config.stages()
    assert [stage.layers for stage in stages] == [(("a", "b"),), (("c", "d"),), (("a", "d"),)]
    assert {(stage.loss, stage.stage_epochs, stage.weight, stage.store) for stage in stages} == {("fitnet", 7, ramp, 1)}
    assert all(stage.stages() == (stage,) for stage in stages)


def test_stage_equals_the_hint_loss_of_its_pair():
    config = FitNet(loss="fitnet", layers=(("a", "b"), ("c", "d"))).stages()[0]
    hint = Hint(loss="hint", layers=(("a", "b"),))
    assert config.student_layers() == ("a",)
    assert (
        config.required_features({"a": (16, 8, 8)}) == (FeatureSpec("b"),) == hint.required_features({"a": (16, 8, 8)})
    )
    terms = [each.build({"a": (16, 8, 8)}, {FeatureSpec("b"): (32, 8, 8)}, DATASET).double() for each in (config, hint)]
    terms[1].load_state_dict(terms[0].state_dict())
    inputs = make_inputs(student={"a": STUDENT_MAPS}, teacher={FeatureSpec("b"): TEACHER_MAPS})
    assert torch.equal(terms[0](inputs), terms[1](inputs))
    assert terms[0](inputs).shape == (8,)


def test_defaults_match_the_reference_code():
    config = FitNet(loss="fitnet", layers=(("a", "b"),))
    assert (config.stage_epochs, config.weight) == (30, 1)


@pytest.mark.parametrize("keys", [{"layers": ()}, {"layers": (("a", "b"),), "stage_epochs": 0}])
def test_no_pairs_or_no_epochs_are_errors(keys):
    with pytest.raises(RecipeError):
        FitNet(loss="fitnet", **keys)
