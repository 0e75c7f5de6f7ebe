"""Tests of compression with onnxruntime's quantizer: repeated and killed runs, and its files."""

import dataclasses
import json

import pytest
from support.tiny_compression import CONFIG, compressed, copied, exported

from kdpipe.stages.compress import quantize_student as module
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.quantization.fx_trace import UntraceableError
from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized

QUANTIZED = dataclasses.replace(CONFIG, steps=("quantize",))


@pytest.fixture
def untraceable(monkeypatch):
    def refuse(*args, **options):
        raise UntraceableError("its module 'stage1' (Block): TraceError: a branch")

    monkeypatch.setattr(module, "prepare_qat", refuse)


def test_killed_calibration_is_repeated_with_equal_bytes(run, tmp_path, monkeypatch, untraceable):
    folder = copied(run, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(module, "finalize", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compressed(folder, run, QUANTIZED, only=("quantize",))
    done = compressed(folder, run, QUANTIZED, only=("quantize",))["int8"]
    assert done["quantizer"] == "onnxruntime" and done["num_epochs"] == 0
    other = copied(run, tmp_path / "two")
    compressed(other, run, QUANTIZED, only=("quantize",))
    for name in ("model.onnx", "model.safetensors"):
        one, two = (place / "compressed" / "int8-seed0" / name for place in (folder, other))
        assert one.read_bytes() == two.read_bytes()
    files = exported(folder, run, QUANTIZED) / "int8"
    assert isinstance(rebuild(files / "model.safetensors").model, OnnxQuantized)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    compressed(folder, run, QUANTIZED, only=("quantize",))
    exported(folder, run, QUANTIZED)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    card = json.loads((files / "card.json").read_text())
    assert card["architecture"]["quantizer"] == "onnxruntime" and "1" in card["latency"]["files"]["int8"]
