"""Tests of how a quantized student is fine-tuned."""

from types import SimpleNamespace

import pytest
from support.tiny_training import NORMALIZE, tiny_network

from kdpipe.stages.compress import quantize_student as module
from kdpipe.stages.compress.quantize_student import QuantizeConfig, quantize_student
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.training.optim import TrainConfig


class Captured(Exception):
    pass


def test_fine_tuning_while_quantized_is_in_float32(monkeypatch):
    """Rounding to bfloat16 before a quantizer would move its codes: they would not be those of the exported file."""

    def fine_tune(job, fine_tuning):
        raise Captured(job.config.precision)

    monkeypatch.setattr(module, "fine_tune", fine_tune)
    folder = SimpleNamespace(begin=lambda fingerprint: None, result=lambda: None)
    fine_tuning = SimpleNamespace(
        job_dir=lambda kind: folder,
        evaluation=lambda normalize: SimpleNamespace(image_shape=(1, 8, 8)),
        fingerprint=lambda *parts: {},
        seed=0,
        spec=None,
    )
    source = SimpleNamespace(load=lambda: ModelBundle(tiny_network().eval(), {}, NORMALIZE))
    with pytest.raises(Captured, match="float32"):
        quantize_student(
            QuantizeConfig(), TrainConfig(precision="bfloat16"), fine_tuning, source, "quantized", name="INT8"
        )
