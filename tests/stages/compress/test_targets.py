"""Tests of compress.target: one network for each grid, the files that each runtime takes, and their figures."""

import dataclasses
import json
from importlib.util import find_spec

import onnx
import pytest
from support.tiny_compression import CONFIG, compressed, copied, exported

from kdpipe.stages.compress.artifacts import runtime_files
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import CompressConfig, fine_tunings
from kdpipe.stages.compress.names import network_name
from kdpipe.stages.compress.quantization.fake_quant import quantizers_of
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.export.float16 import LargestValue
from kdpipe.stages.export.tensorrt_check import require_tensorrt
from kdpipe.store import FingerprintMismatch

HAS_OPENVINO = find_spec("openvino") is not None
ALL = ("onnxruntime", *["openvino"] * HAS_OPENVINO, "tensorrt")
TARGETED = dataclasses.replace(CONFIG, steps=("quantize",), target=ALL, float16=True)


@pytest.fixture(scope="module")
def targeted(run, tmp_path_factory):
    """Return a run whose student was quantized and exported for all targets."""
    folder = copied(run, tmp_path_factory.mktemp("targeted"))
    compressed(folder, run, TARGETED)
    exported(folder, run, TARGETED)
    return folder / "compressed"


def test_targets_with_the_same_grid_share_a_network():
    assert CompressConfig(target=("onnxruntime", "openvino")).grids == {"int8": "affine"}
    assert CompressConfig(target="tensorrt").grids == {"int8": "symmetric"}
    both = CompressConfig(target=("tensorrt", "onnxruntime"), baselines=False)
    assert both.grids == {"int8": "symmetric", "int8-onnxruntime": "affine"}
    assert list(fine_tunings(both)) == ["pruned", "int8", "int8-onnxruntime"]
    assert network_name("int8-tensorrt", prunes=True) == "pruned + INT8 for TensorRT"


def test_wrong_targets_are_refused():
    with pytest.raises(RecipeError, match="'tensorrt', or a list of several"):
        CompressConfig(target="tflite")
    with pytest.raises(RecipeError, match="or a list of several"):
        CompressConfig(target=("openvino", "openvino"))
    with pytest.raises(RecipeError, match="int4"):
        CompressConfig(target="tensorrt", quantize=QuantizeConfig(scheme="int4"))


def test_each_grid_has_its_own_network_and_file(targeted):
    folder = targeted / "artifacts-seed0"
    require_tensorrt(folder / "int8-tensorrt" / "model.onnx")
    types = {tensor.data_type for tensor in onnx.load(folder / "int8" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in types
    for kind, grid in (("int8", "affine"), ("int8-tensorrt", "symmetric")):
        network = rebuild(folder / kind / "model.safetensors")
        assert {quantizer.grid for quantizer in quantizers_of(network.model).values()} == {grid}
    card = json.loads((folder / "card.json").read_text())
    assert card["ranking"][-1] == "int8-tensorrt"  # it is for another runtime than the others
    assert "int8-tensorrt" not in card["latency"]["files"]


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is an extra: pip install 'kdpipe[openvino]'")
def test_openvino_files_have_figures_beside_onnxruntimes(targeted):
    card = json.loads((targeted / "artifacts-seed0" / "card.json").read_text())
    for kind in ("student", "int8"):
        names = {path.name for path in (targeted / "artifacts-seed0" / kind).iterdir()}
        assert {"model.onnx", "model.xml", "model.bin"} <= names and "figures.json" not in names
        figures = card["networks"][kind]["runtimes"]["openvino"]
        assert figures["agreement"] >= 0.95 and figures["bytes"] > 0
        assert abs(figures["accuracy"] - card["networks"][kind]["accuracy"]) <= 0.05
        assert card["latency"]["files"][f"{kind} in openvino"]["1"]["p50_ms"] > 0
    assert not (targeted / "artifacts-seed0" / "int8-tensorrt" / "model.xml").exists()
    text = (targeted / "artifacts-seed0" / "README.md").read_text()
    assert "int8 in OpenVINO" in text


def test_float_networks_have_fp16_files(targeted):
    card = json.loads((targeted / "artifacts-seed0" / "card.json").read_text())
    figures = card["networks"]["student"]["runtimes"]["float16"]
    assert figures["agreement"] >= 0.95 and 0 <= figures["max_logit_difference"] < 0.1
    assert 0 < figures["largest_value"] < 65504
    path = targeted / "artifacts-seed0" / "student" / "model_fp16.onnx"
    assert path.stat().st_size == figures["bytes"]
    assert "student in float16" not in card["latency"]["files"]  # a CPU's time says nothing about a GPU's
    assert "student in FP16" in (targeted / "artifacts-seed0" / "README.md").read_text()
    assert "float16" not in card["networks"]["int8"].get("runtimes", {})


def test_values_too_large_for_fp16_are_refused(run, tmp_path, monkeypatch):
    folder = copied(run, tmp_path)
    monkeypatch.setattr(runtime_files, "largest_value", lambda path, batches: LargestValue(1e5, "Conv in stage1.0"))
    config = dataclasses.replace(CONFIG, steps=(), float16=True)
    with pytest.raises(ModelError, match=r"up to 1e\+05 \(Conv in stage1\.0\).*65,504.*compress\.float16 = false"):
        exported(folder, run, config)


def test_fp16_file_has_the_wanted_opset(run, tmp_path):
    folder = copied(run, tmp_path)
    files = exported(folder, run, dataclasses.replace(CONFIG, steps=(), float16=True, opset=17)) / "student"
    assert [entry.version for entry in onnx.load(files / "model_fp16.onnx").opset_import if not entry.domain] == [17]


def test_repeated_compression_writes_nothing(run, targeted):
    before = {path: path.stat().st_mtime_ns for path in targeted.rglob("*")}
    compressed(targeted.parent, run, TARGETED)
    exported(targeted.parent, run, TARGETED)
    assert {path: path.stat().st_mtime_ns for path in targeted.rglob("*")} == before


def test_added_target_keeps_the_first_network(run, targeted, tmp_path):
    folder = copied(run, tmp_path)
    one = dataclasses.replace(TARGETED, target="onnxruntime")
    compressed(folder, run, one)
    for name in ("model.safetensors", "model.onnx", "job.json"):
        assert (folder / "compressed/int8-seed0" / name).read_bytes() == (targeted / "int8-seed0" / name).read_bytes()
    with pytest.raises(FingerprintMismatch, match="quantize.grid"):
        compressed(folder, run, dataclasses.replace(one, target="tensorrt"))
