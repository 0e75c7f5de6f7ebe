"""Losses that do not go together with the recipe's other settings are refused before anything is trained."""

import pytest

from kdpipe.stages.distillation.compatibility import check_losses
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.views.config import Views


@pytest.mark.parametrize("loss", [NKD(), MLLD()])
def test_temperatures_of_teachers_do_not_replace_several(loss):
    teachers = TeachersConfig(temperatures=(4.0, 2.0))
    with pytest.raises(RecipeError, match=r"distill.0 \((nkd|mlld)\) takes .* at several temperatures"):
        check_losses([loss], Views(), teachers)
    check_losses([type(loss)(store=1), KD()], Views(), teachers)
