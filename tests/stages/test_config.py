import numpy as np
import pytest
import torch

from kdpipe.losses import KD, RKD
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views


def test_settings_may_be_what_a_recipe_writes():
    assert TrainConfig(milestones=[1, 2], betas=[0.9, 0.99]) == TrainConfig(milestones=(1, 2), betas=(0.9, 0.99))
    assert KD(weight={"start": 0, "end": 1}).weight.end == 1
    assert Views(2, mix={"mixup_alpha": 0.2}).mix.mixup_alpha == 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KD(4.0), "by name .*: found a positional float; to call it, build it first: KD"),
        (lambda: KD(torch.zeros(2, 3), torch.zeros(2, 3)), "found a positional Tensor"),
        (lambda: RKD([("a", "b")], 2.0), "found a positional float"),
        (lambda: TrainConfig(3), "found a positional int"),
        (lambda: KD(temperatur=2.0), "did you mean 'temperature'"),
        (lambda: TrainConfig(epochs="3"), "epochs = '3': it must be a whole number"),
        (lambda: TrainConfig(milestones=[0]), "milestones"),
        (lambda: TrainConfig(lr=np.array([1.0])), "lr"),
    ],
)
def test_wrong_settings_are_one_sentence(make, message):
    with pytest.raises(RecipeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
