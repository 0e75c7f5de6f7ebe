"""TF32 is switched for a block, by torch's older settings or, where the user's code has them, the newer ones."""

import subprocess
import sys

import pytest
import torch

from kdpipe.stages.compute.tf32 import tf32

NEWER = """
import torch
from kdpipe.stages.compute.tf32 import tf32
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"
operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul
with tf32(enabled=False):
    print([operation.fp32_precision for operation in operations])
with tf32(enabled=True):
    print([operation.fp32_precision for operation in operations])
print([operation.fp32_precision for operation in operations])
"""


def switches():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("enabled", [True, False])
def test_switched_and_restored(enabled):
    before = switches()
    with tf32(enabled=enabled):
        assert switches()[:2] == (enabled, enabled)
    assert switches() == before


def test_restored_after_an_error():
    before = switches()
    with pytest.raises(ValueError), tf32(enabled=True):
        raise ValueError
    assert switches() == before


def test_newer_settings():
    found = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["['ieee', 'ieee']", "['tf32', 'tf32']", "['ieee', 'tf32']"]
