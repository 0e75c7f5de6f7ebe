"""`kdpipe.losses` and `kdpipe.losses.functional`: their names, and an import without torch."""

import subprocess
import sys

import pytest
from support.kdpipe_process import environment

import kdpipe.losses
import kdpipe.losses.functional
from kdpipe.stages.losses.registry import LOSSES


@pytest.mark.parametrize("module", [kdpipe.losses, kdpipe.losses.functional])
def test_all_names_exist_once(module):
    known = {*module._MODULE_OF, *(["functional"] if module is kdpipe.losses else [])}
    assert set(module.__all__) == known
    assert len(module.__all__) == len(known)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'kd_los'"):
        module.kd_los  # noqa: B018


def test_every_built_in_loss_is_public():
    assert all(getattr(kdpipe.losses, kind.__name__) is kind for kind in LOSSES.builtin.values())


def test_importing_the_names_costs_no_torch():
    code = "import sys, kdpipe.losses.functional; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
