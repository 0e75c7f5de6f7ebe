"""Tests of compress.target: one network for each grid, the files that each runtime takes, and their figures."""

import dataclasses
import json
from importlib.util import find_spec

import onnx
import pytest
import torch
from support.tiny_compression import CONFIG, compressed, copied, exported

from kdpipe.stages.compress.artifacts import runtime_files
from kdpipe.stages.compress.artifacts.load import image_shape_of, rebuild
from kdpipe.stages.compress.compress import CompressConfig, fine_tunings
from kdpipe.stages.compress.names import network_name
from kdpipe.stages.compress.quantization.fake_quant import QuantConv2d, QuantLinear, quantizers_of
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.export.float16 import LargestValue
from kdpipe.stages.export.tensorrt_check import require_tensorrt
from kdpipe.stages.training.job_dir import write_json_file
from kdpipe.store import FingerprintMismatch, make_folders

HAS_OPENVINO = find_spec("openvino") is not None
HAS_EXECUTORCH = find_spec("executorch") is not None
ALL = ("onnxruntime", *["openvino"] * HAS_OPENVINO, *["executorch"] * HAS_EXECUTORCH, "tensorrt")
TARGETED = dataclasses.replace(CONFIG, steps=("quantize",), target=ALL, float16=True)


@pytest.fixture(scope="module")
def targeted(run, tmp_path_factory):
    """Return a run whose student was quantized and exported for all targets."""
    folder = copied(run, tmp_path_factory.mktemp("targeted"))
    compressed(folder, run, TARGETED)
    exported(folder, run, TARGETED)
    return folder / "compressed"


def test_targets_with_the_same_grid_share_a_network():
    assert CompressConfig(target=("onnxruntime", "openvino", "executorch")).grids == {"int8": "affine"}
    assert network_name("int8-executorch", prunes=False) == "INT8 for ExecuTorch"
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
    for other in ("tensorrt", "executorch"):
        with pytest.raises(
            RecipeError, match=f"'w4a8' is for 'onnxruntime' and 'openvino', not for target = '{other}'"
        ):
            CompressConfig(target=("onnxruntime", other), quantize=QuantizeConfig(scheme="w4a8"))


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


def test_files_with_weights_of_4_bits_are_smaller(run, targeted, tmp_path):
    folder = copied(run, tmp_path)
    target = ("onnxruntime", *["openvino"] * HAS_OPENVINO)
    config = dataclasses.replace(TARGETED, target=target, quantize=dataclasses.replace(CONFIG.quantize, scheme="w4a8"))
    compressed(folder, run, config)
    artifacts = exported(folder, run, config)
    card = json.loads((artifacts / "card.json").read_text())
    assert card["networks"]["w4a8"]["onnx_agreement"] >= 0.95
    for name in ("model.onnx", *["model.bin"] * HAS_OPENVINO):
        int8 = targeted / "artifacts-seed0" / "int8" / name
        assert (artifacts / "w4a8" / name).stat().st_size < int8.stat().st_size
    images = torch.rand(3, *image_shape_of(rebuild(artifacts / "w4a8" / "model.safetensors").architecture))
    again, network = (rebuild(artifacts / "w4a8" / "model.safetensors").model for _ in range(2))
    assert torch.equal(again(images), network(images))
    assert {layer.bits for layer in network.modules() if isinstance(layer, QuantConv2d | QuantLinear)} == {4, 8}
    assert network_name("w4a8", prunes=True) == "pruned + W4A8"


def test_budget_chooses_layers_once_and_the_card_names_them(run, tmp_path):
    settings = dataclasses.replace(CONFIG.quantize, scheme="w4a8", budget=0.8, step_size="learned")
    config = dataclasses.replace(TARGETED, target="onnxruntime", quantize=settings)
    first, second = copied(run, tmp_path / "first"), copied(run, tmp_path / "second")
    compressed(first, run, config)
    figures = json.loads((first / "compressed/w4a8-seed0/result.json").read_text())
    other = [next(path for path in figures["kl_of_4_bits"] if path not in figures["int4_layers"])]
    make_folders([second / "compressed/w4a8-seed0"])
    killed = {"int4_layers": other, "kl_of_4_bits": figures["kl_of_4_bits"]}
    write_json_file(second / "compressed/w4a8-seed0/int4_layers.json", killed)
    compressed(second, run, config)
    artifacts = exported(second, run, config)
    assert f"Weights of 4 bits: {other[0]}." in (artifacts / "w4a8" / "README.md").read_text()
    network = rebuild(artifacts / "w4a8" / "model.safetensors").model
    assert [path for path, layer in network.named_modules() if getattr(layer, "bits", 8) == 4] == other
    assert not list(second.glob("compressed/w4a8-seed0/int4_layers*"))
    assert card_layers(artifacts) == other


def card_layers(artifacts) -> list[str]:
    return json.loads((artifacts / "w4a8" / "card.json").read_text())["architecture"]["int4_layers"]


@pytest.mark.skipif(not HAS_EXECUTORCH, reason="ExecuTorch is an extra: pip install 'kdpipe[executorch]'")
def test_executorch_programs_have_figures_beside_onnxruntimes(targeted):
    card = json.loads((targeted / "artifacts-seed0" / "card.json").read_text())
    for kind in ("student", "int8"):
        folder = targeted / "artifacts-seed0" / kind
        figures = card["networks"][kind]["runtimes"]["executorch"]
        assert figures["bytes"] == (folder / "model.pte").stat().st_size
        assert figures["agreement"] >= 0.95 and figures["max_logit_difference"] < 0.05
        assert abs(figures["accuracy"] - card["networks"][kind]["accuracy"]) <= 0.05
        assert card["latency"]["files"][f"{kind} in executorch"]["1"]["p50_ms"] > 0
        assert "model.pte" in (folder / "README.md").read_text()
    assert not (targeted / "artifacts-seed0" / "int8-tensorrt" / "model.pte").exists()
    assert "int8 in ExecuTorch" in (targeted / "artifacts-seed0" / "README.md").read_text()


@pytest.mark.skipif(not HAS_EXECUTORCH, reason="ExecuTorch is an extra: pip install 'kdpipe[executorch]'")
def test_damaged_or_missing_program_is_made_again_the_same(run, targeted, tmp_path):
    folder = copied(targeted.parent, tmp_path)
    paths = [folder / "compressed/executorch-seed0" / kind / "model.pte" for kind in ("student", "int8")]
    before = [path.read_bytes() for path in paths]
    paths[0].write_bytes(before[0][:1000])
    (paths[1].with_name("figures.json")).unlink()
    exported(folder, run, TARGETED)
    assert [path.read_bytes() for path in paths] == before


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
